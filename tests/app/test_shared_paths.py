"""Nothing that people share holds a path of the machine it was made on."""

import shutil
import sys
from pathlib import Path

import pytest

import edge_dit_runtime as er
from edge_dit.app.planner import plan_job, report_on
from edge_dit.app.run import begin
from edge_dit.planning.job import read_job
from edge_dit.planning.selection import cache_file, write_selection
from selections import selection


@pytest.fixture(scope="module")
def written(road, tmp_path_factory):
    """Every file that the stages write."""
    place = tmp_path_factory.mktemp("somebody-private")
    begin(road.job, place / "out", None, lambda _: None)
    er.train(road.bundle, road.bank, place / "run", target="onnx", steps=2)
    er.save_lora(place / "run", place / "lora")
    folders = (place, road.bank, road.bundle)
    return [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]


def test_no_file_of_a_road_holds_a_path(written, road):
    assert len([f for f in written if f.suffix in (".onnx", ".pte", ".safetensors")]) > 10
    assert {"job.json", "plan.json", "run.json", "manifest.json"} <= {f.name for f in written}
    here = Path(__file__).parents[2]
    folders = (str(road.folder), "somebody-private", f"{Path.home()}/", str(here), sys.prefix)
    for file in written:
        data = file.read_bytes()
        assert not [folder for folder in folders if folder.encode() in data], file


def test_no_page_of_a_plan_holds_a_path(workplace, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-of-somebody"))
    for name in ("model", "images"):
        shutil.copytree(workplace / name, tmp_path / "somebody" / name)
    shutil.copy(workplace / "job.toml", tmp_path / "somebody")
    job = read_job(tmp_path / "somebody" / "job.toml")
    for where in (None, job.model.path / "selection.json"):
        plan = plan_job(job).plan
        found = selection(
            (0, 0.1, 0.2, 0.5, 0.9), (0, 0.2, 0.3, 0.6, 0.9), model_hash=plan.model_hash
        )
        write_selection(found, where or cache_file(plan.model_hash))
        report_on(job, plan_job(job), tmp_path / "plan.html")
        text = (tmp_path / "plan.html").read_text("utf-8")
        assert "blocks by" in text
        assert "somebody" not in text
