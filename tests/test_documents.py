"""What documents name exists: links, paths, headings, commands and options; and their examples."""

import json
import re
import runpy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from edge_dit.budget.footprint import Profile, Runtime, read_profile
from edge_dit.cli import app
from edge_dit.contract.bank import Draw, Index
from edge_dit.contract.bundle import FileSpec, Manifest, TensorSpec
from edge_dit.contract.certificate import (
    BankResult,
    Certificate,
    Difference,
    Draws,
    TargetResult,
)
from edge_dit.planning.selection import Between, Selection
from edge_dit_runtime.training import Run
from test_layout import MAY_IMPORT

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "FAULTS", "SECURITY")),
    ROOT / "COMPATIBILITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / "samples" / folder / "README.md" for folder in ("cpp", "reproduce")),
]
CODE = [
    path
    for folder in ("edge_dit", "export", "runtime_py", "samples", "tests", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
TOP = "edge_dit|export|runtime_py|samples|tests|docs"
PATH = re.compile(rf"(?<![\w/.])((?:{TOP})/[\w/.\-]+\.(?:py|md|toml|json|yml|j2))")
"""A path from the root of the repository."""
COMMAND = re.compile(r"edge-dit ([a-z]+)([^\n|]*)")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(text: str) -> set[str]:
    """The fragments by which GitHub links to headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", title.strip().lower()) for title in titles]
    return {title.replace(" ", "-") for title in plain}


def broken_links(document: Path) -> list[str]:
    """Relative links of a document that lead to no file, or to no heading."""
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in link:
            continue
        place, _, heading = link.partition("#")
        target = document.parent / place if place else document
        if not target.exists() or (heading and heading not in anchors(target.read_text())):
            wrong.append(link)
    return wrong


def missing_paths(text: str) -> list[str]:
    return [path for path in PATH.findall(text) if not (ROOT / path).exists()]


def commands_in(text: str) -> list[tuple[str, str]]:
    """Commands of edge-dit in a document's code, each with what follows it."""
    fenced = re.findall(r"```.*?```", text, re.DOTALL)
    inline = re.findall(r"`(edge-dit [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return COMMAND.findall("\n".join([*fenced, *(code.replace("\n", " ") for code in inline)]))


def unknown_words(text: str) -> list[str]:
    """Commands and options of edge-dit that the command line does not have."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    wrong = []
    for command, rest in commands_in(text):
        if command not in commands:
            wrong.append(command)
            continue
        known = {o for p in commands[command].params for o in [*p.opts, *p.secondary_opts]}
        given = re.findall(r"(?<!\S)(--?[a-z][a-z\-]*)", rest.partition("#")[0])
        wrong += [f"{command} {option}" for option in given if option not in {*known, "--help"}]
    return wrong


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_and_paths_lead_somewhere(document):
    assert broken_links(document) == []
    assert missing_paths(document.read_text()) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_commands_and_options_are_those_of_the_command_line(document):
    assert unknown_words(document.read_text()) == []


def test_paths_in_code_lead_somewhere():
    here = Path(__file__)
    wrong = {name(path): missing_paths(path.read_text()) for path in CODE if path != here}
    assert {path: paths for path, paths in wrong.items() if paths} == {}


def test_what_leads_nowhere_is_noticed(tmp_path):
    document = tmp_path / "page.md"
    document.write_text("# One\n[a](page.md#one) [b](page.md#two) [c](gone.md) [d](https://x.org)")
    assert broken_links(document) == ["page.md#two", "gone.md"]
    assert missing_paths("`edge_dit/cli.py` and edge_dit/inspector.py") == ["edge_dit/inspector.py"]
    said = "`edge-dit train b/ --bank k/ --fast` and `edge-dit fly`"
    assert unknown_words(said) == ["train --fast", "fly"]


def test_citations_of_the_method_are_headings_or_equations_of_it():
    method = (ROOT / "docs" / "method.md").read_text()
    cited = re.compile(r"docs/method\.md,\s+((?:Eq\. \d|Algorithm \d|Tables? \d+)|\"[^\"]+\")")
    found = [
        (name(path), what.strip('"'))
        for path in CODE
        if path != Path(__file__)
        for what in cited.findall(re.sub(r"\s*\n\s*(?:# )?", " ", path.read_text()))
    ]
    assert found
    assert [(path, what) for path, what in found if what not in method] == []


def test_the_floors_in_the_documents_are_those_that_are_kept():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE)
    below: set[str] = set()
    told = {}
    for folder, imports in reversed(rows):  # the table goes from the top down
        named = set() if imports == "nothing" else set(imports.split(", "))
        told[folder] = set(below) if imports == "everything below" else named
        below.add(folder)
    assert told == {folder: set(may) for folder, may in MAY_IMPORT.items() if folder != "api"}


def test_performance_document_is_what_the_script_renders():
    made = runpy.run_path(str(ROOT / "docs" / "make_performance.py"))["render"]()
    written = (ROOT / "docs" / "performance.md").read_text()
    assert written == made, "run: python docs/make_performance.py"


def test_a_benchmark_becomes_a_table_with_its_raw_file_and_command(tmp_path):
    row = {
        "target": "onnx",
        "layout": "streamed",
        "dtype": "int8",
        "compute": "int8",
        "step_ms": 1500.0,
        "eager_ms": 1000.0,
        "ratio_to_eager": 1.5,
        "ratio_to_fastest_torch": 2.5,
        "full_lora_ms": None,
        "ratio_to_full_lora": None,
        "rss_anon_mb": 220.0,
        "rss_file_mb": 120.0,
        "artifact_bytes": 290_000_000,
        "export_s": 15.0,
        "export_rss_mb": 900.0,
        "max_grad_rel_error": 4e-5,
        "eager_grad_rel_error": 9e-5,
    }
    case = {"config": "flux.1-dev", "trained": [4, 5], "tokens": 256, "text": 512}
    case |= {"rank": 16, "steps": 5, "full_lora": False}
    eager = {"name": "eager", "step_ms": 1000.0, "rss_anon_mb": 2700.0, "rss_file_mb": 9.0}
    eager |= {"grad_rel_error": 2e-6, "note": ""}
    compiled = {"name": "compile", "note": "no compiler"}
    compiled |= dict.fromkeys(["step_ms", "rss_anon_mb", "rss_file_mb", "grad_rel_error"])
    found = {"case": case, "machine": {"processor": "Xeon"}, "baselines": [eager, compiled]}
    operators = {"onnx": {"Gemm.ms": 3.0, "Gemm.calls": 2.0, "Add.ms": 1.0, "Add.calls": 9.0}}
    found |= {"rows": [row], "operators": operators}
    (tmp_path / "bench-flux.json").write_text(json.dumps(found))
    text = runpy.run_path(str(ROOT / "docs" / "make_performance.py"))["render"](tmp_path)
    assert (
        "| onnx:streamed:int8:int8 | 1,500 | 1.50 | 2.50 | - | 220 | 120 | 290 | 15 | 4.0e-05 |"
        in text
    )
    assert "| torch, eager | 1,000 | 1.00 | 2,700 | 9 | 2.0e-06 |" in text
    assert "| torch, compile | - | - | - | - | no compiler |" in text
    assert "- operators of onnx, 4 ms: Gemm 75%, Add 25%" in text
    assert "Machine: processor Xeon." in text
    assert "docs/results/bench-flux.json" in text
    assert "--trained 4+5 --tokens 256 --text 512 --rank 16 --steps 5 --no-full-lora" in text
    assert "--baseline eager --baseline compile --profile --target onnx:streamed" in text
    assert "No benchmark" not in text


@pytest.mark.parametrize(
    ("document", "kind"),
    [
        ("bundle.md", Manifest),
        ("bundle.md", TensorSpec),
        ("bundle.md", FileSpec),
        ("bundle.md", Index),
        ("bundle.md", Draw),
        ("bundle.md", Run),
        ("selection.md", Selection),
        ("selection.md", Between),
        ("selection.md", Profile),
        ("selection.md", Runtime),
    ],
)
def test_every_key_of_a_file_is_in_its_document(document, kind):
    text = (ROOT / "docs" / document).read_text()
    keys = kind.model_fields if issubclass(kind, BaseModel) else [f.name for f in fields(kind)]
    assert [key for key in keys if f"`{key}`" not in text] == []


def test_the_device_profile_in_the_documents_is_one(tmp_path):
    text = (ROOT / "docs" / "selection.md").read_text()
    (example,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    (tmp_path / "device.json").write_text(example)
    assert set(read_profile(tmp_path / "device.json").runtimes) == {"onnx", "onnx:streamed"}


def test_the_certificate_in_the_documents_has_the_keys_of_one():
    text = (ROOT / "docs" / "verify.md").read_text()
    (example,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    said = json.loads(example)
    row = Difference("gradients.a", "gradients", 1e-9, 1e-9, 1.0, 1e-6, 1e-4)
    result = TargetResult(Draws([4], [1], [0]), [row])
    bank = BankResult("0", [0], [replace(row, name="bank.draw 0.entry", kind="bank")])
    made: Any = Certificate("0", "torch", 3, {"onnx": result}, bank).as_json()
    assert said.keys() == made.keys()
    assert said["bank"].keys() == made["bank"].keys()
    assert [key for key in made["bank"] if key != "passed" and f"`bank.{key}`" not in text] == []
    (one,) = said["targets"].values()
    other = made["targets"]["onnx"]
    assert one.keys() == other.keys()
    assert one["draws"].keys() == other["draws"].keys()
    assert one["worst"]["gradients"].keys() == other["worst"]["gradients"].keys()
    for key in [*other, *other["draws"]]:
        assert key in ("draws", "passed") or f"{key}`" in text, key


def test_the_tests_that_inputs_names_exist():
    text = (ROOT / "docs" / "inputs.md").read_text()
    named = re.findall(r"`(?:[\w/]+/)?(test_\w+\.py)(?:::(test_\w+))?`", text)
    assert len(named) > 60
    found = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for file, test in named:
        assert file in found, file
        assert not test or f"def {test}(" in found[file], f"{file}::{test}"


def test_the_walk_through_of_a_family_is_its_own_code():
    text = (ROOT / "docs" / "families.md").read_text()
    source = (ROOT / "edge_dit" / "models" / "families" / "chroma.py").read_text().splitlines()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 5
    for line in "".join(blocks).splitlines():
        assert line in source, line
