"""A few hundred mutated inputs for every reader; `fuzz.py` does as many as one likes."""

import ast
import re
from pathlib import Path

import fuzz
import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "manifest",
    "index",
    "plan",
    "selection",
    "profile",
    "run",
    "certificate",
    "job",
    "tensors",
    "mapped",
    "adapter",
    "exported",
    "peft",
    "peft config",
    "state",
    "external data",
)


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return {reader.name: reader for reader in fuzz.readers(tmp_path_factory.mktemp("fuzz"))}


def test_every_reader_is_fuzzed(readers):
    assert tuple(readers) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_mutated_inputs_are_refused_or_harmless(readers, name):
    others = [reader.path.read_bytes() for reader in readers.values()]
    figures = fuzz.fuzz(readers[name], 300, 0, others)
    assert not figures.findings, "\n".join(figures.findings[:5])
    assert figures.inputs == 300
    assert figures.accepted < 300 or name == "certificate"


def test_the_fuzzer_would_notice(readers):
    """Each kind of finding, by readers that are wrong on purpose."""

    def findings(read, data, **changes):
        reader = fuzz.Reader("x", readers["run"].path, read, (ValueError,), "json", True)
        figures = fuzz.Figures()
        whole = reader.path.read_bytes()
        fuzz.tracemalloc.start()
        try:
            fuzz.judge(reader, data, False, "right", figures)
        finally:
            fuzz.tracemalloc.stop()
            reader.path.write_bytes(whole)
        return "".join(figures.findings)

    def fail():
        raise KeyError("a")

    def wait():
        while True:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz, "SECONDS", 0.1)
        assert "took more than" in findings(wait, b"")
    assert "KeyError" in findings(fail, b"")
    assert "bytes of memory" in findings(lambda: len(bytearray(2**27)), b"")
    assert "accepted a corruption" in findings(lambda: "wrong", b'{"sha256": "0"}')
    assert findings(lambda: "right", b'{"sha256": "0"}') == ""
    assert findings(lambda: int("x"), b"") == ""


def names_in(path):
    """Names of the tests in a file."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef) and n.name[:5] == "test_"}


def test_every_fault_in_the_table_has_its_test():
    text = (ROOT / "FAULTS.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\|(?! ?---| fault )", line)]
    assert len(rows) >= 25
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, name in named:
            folder = ROOT if "/" in file else ROOT / "tests" / "trust"
            assert name in names_in(folder / file), row
