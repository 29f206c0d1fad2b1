"""`edge-dit compare`: the table, the page, and what it says about runs that do not compare."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edge_dit_runtime.page.compare import page, read_runs
from edge_dit_runtime.run_folder import SETTINGS
from edge_dit_runtime.step_log import StepLog
from run_folders import PLAN, RUN, made_log, write_run


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Two runs of one bundle with other rates."""
    other = {**PLAN, "optimizer": {**PLAN["optimizer"], "lr": 0.03}}
    return [
        write_run(tmp_path / "slow", made_log(60)),
        write_run(tmp_path / "fast", made_log(45, 1, 0.03), replace(RUN, steps=45), other),
    ]


def test_facts_are_those_of_the_logs(run, runs):
    code, out, _ = run("compare", *runs, "--json")
    assert code == 0
    facts = json.loads(out)
    assert [r["folder"] for r in facts["runs"]] == list(map(str, runs))
    log = made_log(60)
    assert facts["runs"][0]["log"]["loss"] == log.recent
    assert facts["runs"][0]["log"]["skipped"] == 3
    assert facts["runs"][0]["log"]["seconds_per_step"] == 0.25
    assert facts["differ"] == {"optimizer.lr": ["0.01", "0.03"], "steps": ["60", "45"]}
    assert facts["notes"] == []


def test_the_table(run, runs):
    code, out, _ = run("compare", *runs)
    assert code == 0
    rows = [line for line in out.splitlines() if line.startswith("[1]")]
    assert "60 of 60" in rows[0]
    at_45 = StepLog(losses=made_log(60).losses[:45]).recent
    assert f"{at_45:.3g}" in rows[0]
    assert "at step 45" in out
    assert "0.125-0.25" in out
    assert ["optimizer.lr", "0.01", "0.03"] in [line.split() for line in out.splitlines()]


def test_the_page_has_every_run(run, runs, tmp_path):
    place = tmp_path / "compare.html"
    assert run("compare", *runs, "-o", place)[0] == 0
    html = place.read_text()
    for number, folder in enumerate(runs):
        assert f"[{number + 1}] {folder.name}" in html
        assert f'class="line colour-{number}"' in html
        assert f'class="points colour-{number}"' in html
    assert "optimizer.lr" in html
    assert "<script" not in html
    assert html.count("<img") == 0  # nothing was painted


def test_what_stands_against_a_comparison_is_said(runs, tmp_path):
    strange = replace(RUN, manifest_sha256="other", bank_sha256="other")
    third = write_run(tmp_path / "third", StepLog(), strange)
    (third / SETTINGS).unlink()
    read = read_runs([*runs, third])
    html = page(read)
    for words in (
        "different bundles",
        "different draws",
        "Few settings are known of [3] third",
        "No step was saved yet in [3] third",
    ):
        assert words in html


def bad_inputs(runs: list[Path], tmp_path: Path) -> dict[str, tuple[list[Path], str]]:
    damaged = write_run(tmp_path / "damaged", made_log(3))
    (damaged / "loss.csv").write_text("step,draw\n0,1\n")
    edited = write_run(tmp_path / "edited", made_log(3))
    text = (edited / SETTINGS).read_text()
    (edited / SETTINGS).write_text(text.replace("to_q", "to_k"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").mkdir()
    inner = write_run(tmp_path / "out" / "run", made_log(3))
    return {
        "one": (runs[:1], "one run"),
        "twice": ([*runs, runs[0].parent / "fast" / ".." / "slow"], "named twice"),
        "missing": ([*runs, tmp_path / "nowhere"], "edge-dit train"),
        "of edge-dit run": ([*runs, inner.parent], f"edge-dit compare {inner}"),
        "no run": ([*runs, tmp_path / "empty"], "edge-dit train"),
        "damaged": ([*runs, damaged], "not a table of losses"),
        "edited": ([*runs, edited], "goes on without"),
    }


BAD = ["one", "twice", "missing", "of edge-dit run", "no run", "damaged", "edited"]


@pytest.mark.parametrize("which", BAD)
def test_bad_input(run, runs, tmp_path, which):
    folders, words = bad_inputs(runs, tmp_path)[which]
    code, out, err = run("compare", *folders, "-o", tmp_path / "page.html")
    assert (code, out) == (2, "")
    assert words in err
    assert err.startswith("edge-dit: ")
    assert not (tmp_path / "page.html").exists()


def test_names_are_what_differs_of_the_paths(tmp_path):
    for out in ("one", "two"):
        (tmp_path / out).mkdir()
    folders = [write_run(tmp_path / out / "run", made_log(3)) for out in ("one", "two")]
    assert [read.name for read in read_runs(folders)] == ["[1] one/run", "[2] two/run"]
    inner = write_run(folders[0] / "inner", made_log(3))
    assert [r.name for r in read_runs([folders[0], inner])] == ["[1] run", "[2] inner"]
