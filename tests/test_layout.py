"""The floors of the house: what each folder may import, and what the device imports at all.

Every import counts, those within functions too; only `if TYPE_CHECKING:` does not.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "edge_dit": ROOT / "edge_dit",
    "edge_dit_export": ROOT / "export" / "edge_dit_export",
    "edge_dit_runtime": ROOT / "runtime_py" / "edge_dit_runtime",
}
GROUND = {"errors", "text", "progress"}
DEVICE = {"ground", "store", "contract"}
PICTURES = DEVICE | {"pictures"}
HOST = PICTURES | {"models"}
MAY_IMPORT = {
    "ground": set(),
    "store": {"ground"},
    "contract": {"ground", "store"},
    "cluster": {"ground", "store"},
    "pictures": DEVICE,
    "runtime": PICTURES,
    "models": PICTURES,
    "planning": HOST,
    "reference": HOST | {"planning", "cluster"},
    "budget": HOST | {"planning"},
    "select": HOST | {"planning", "reference", "cluster"},
    "export": HOST | {"planning", "reference", "budget"},
    "app": HOST | {"planning", "reference", "budget", "select", "export", "runtime", "cluster"},
    "cli": HOST
    | {"planning", "reference", "budget", "select", "export", "runtime", "cluster", "app"},
    "api": set(),  # edge_dit/__init__.py names what is below and imports it when it is asked for
}
"""Folder -> folders that it may import besides itself."""


def module_files() -> dict[str, Path]:
    found = {}
    for package, base in PACKAGES.items():
        for path in base.rglob("*.py"):
            parts = (package, *path.relative_to(base).with_suffix("").parts)
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = module_files()


def folder_of(module: str) -> str:
    package, *inside = module.split(".")
    if package != "edge_dit":
        return package.removeprefix("edge_dit_")
    if not inside:
        return "api"
    return "ground" if inside[0] in GROUND else inside[0]


def imported(module: str) -> set[str]:
    """Modules of ours that ``module`` imports, anywhere in it."""
    path = MODULES[module]
    tree = ast.parse(path.read_text())
    typed = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typed:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name and name != module:
                found.add(name)
    return found - {"edge_dit", "edge_dit_export", "edge_dit_runtime"}


def test_every_folder_is_in_the_table():
    assert {folder_of(module) for module in MODULES} == MAY_IMPORT.keys()


def test_the_table_has_floors():
    """No folder may import one that may import it, however far around."""
    above: list[str] = []

    def descend(folder: str) -> None:
        assert folder not in above, f"{' -> '.join([*above, folder])}"
        above.append(folder)
        for below in MAY_IMPORT[folder]:
            descend(below)
        above.pop()

    for folder in MAY_IMPORT:
        descend(folder)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module):
    folder = folder_of(module)
    wrong = {m for m in imported(module) if folder_of(m) not in {folder, *MAY_IMPORT[folder]}}
    assert not wrong, f"{module} ({folder}) imports {', '.join(sorted(wrong))}"


def test_no_circle_among_modules():
    graph = {module: imported(module) for module in MODULES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join([*way, module])}"
        if module not in done:
            for inner in graph[module]:
                visit(inner, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if any(name == b or name.startswith(b + ".") for b in {blocked!r}):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
"""
HEAVY = (
    "torch",
    "diffusers",
    "peft",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "executorch",
)
HOST_ONLY = (
    "edge_dit_export",
    *(f"edge_dit.{f}" for f in sorted(MAY_IMPORT.keys() - DEVICE - {"runtime", "export", "api"})),
)


def run_without(blocked: tuple[str, ...], code: str) -> str:
    script = BLOCK.format(blocked=blocked) + code
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_nothing_heavy():
    run_without(
        (*HEAVY, "onnxruntime"),
        "import edge_dit, edge_dit.cli, edge_dit.contract.bank, edge_dit.planning.make,"
        "edge_dit.planning.job, edge_dit.pictures.images, edge_dit.app.doctor,"
        "edge_dit.app.describe\n"
        "import edge_dit_runtime, edge_dit_runtime.training",
    )


def test_trains_the_onnx_target_without_torch_or_any_host_module(road, tmp_path):
    code = (
        "from pathlib import Path\n"
        "from edge_dit_runtime.training import train\n"
        f"run = train(Path({str(road.bundle)!r}), Path({str(road.bank)!r}), "
        f"Path({str(tmp_path / 'run')!r}), target='onnx', steps=3)\n"
        "print(run.done, 'torch' in sys.modules)"
    )
    assert run_without((*HEAVY, *HOST_ONLY), code).split() == ["3", "False"]
    assert (tmp_path / "run" / "adapter.safetensors").is_file()
