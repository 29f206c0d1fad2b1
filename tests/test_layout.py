"""The import rule: edge_dit <- edge_dit_export, edge_dit <- edge_dit_runtime, and no torch at the
top of the host package or the runtime.
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
COMPOSITION_ROOTS = {"cli.py", "quickstart.py", "inspect.py", "bench.py"}
"""Modules of edge_dit that may import the other two, within functions only."""
FORBIDDEN = {
    "edge_dit": {"edge_dit_export", "edge_dit_runtime"},
    "edge_dit_export": {"edge_dit_runtime"},
    "edge_dit_runtime": {"edge_dit_export"},
}


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    for path in PACKAGES[package].rglob("*.py"):
        tree = ast.parse(path.read_text())
        if package == "edge_dit" and path.name in COMPOSITION_ROOTS:
            tree.body = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        wrong = imports(tree) & FORBIDDEN[package]
        assert not wrong, f"{path} imports {wrong}"


BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
"""
HEAVY = ("torch", "diffusers", "peft", "transformers", "onnx", "onnxscript", "executorch")


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
        "import edge_dit, edge_dit.cli, edge_dit.bank, edge_dit.plan, edge_dit.job,"
        "edge_dit.images, edge_dit.bundle, edge_dit.adapter, edge_dit.doctor, edge_dit.inspect\n"
        "import edge_dit_runtime, edge_dit_runtime.train, edge_dit_runtime.verify",
    )


def test_trains_the_onnx_target_without_torch(road, tmp_path):
    code = (
        "from pathlib import Path\n"
        "from edge_dit_runtime.train import train\n"
        f"run = train(Path({str(road.bundle)!r}), Path({str(road.bank)!r}), "
        f"Path({str(tmp_path / 'run')!r}), 'onnx', steps=3)\n"
        "print(run.done, 'torch' in sys.modules)"
    )
    assert run_without(HEAVY, code).split() == ["3", "False"]
    assert (tmp_path / "run" / "adapter.safetensors").is_file()
