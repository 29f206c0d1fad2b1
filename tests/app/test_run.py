"""The whole road in one command: it ends with an adapter and goes on where it stopped."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

import edge_dit_runtime as er
from edge_dit.app.run import exported_as, run
from edge_dit.errors import BadInput, CheckFailed
from edge_dit.models.pipeline import load_pipeline
from edge_dit.planning.plan import model_of
from edge_dit.reference.evaluate import adapted


@pytest.fixture(scope="module")
def place(workplace, tmp_path_factory):
    """A folder with a job of few steps and two previews, its pictures and its model."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("model", "images"):
        os.symlink(workplace / name, folder / name)
    text = (workplace / "job.toml").read_text()
    steps = f"steps = {STEPS}\npreview_every = {STEPS // 2}"
    lines = [steps if line.startswith("steps") else line for line in text.split("\n")]
    (folder / "job.toml").write_text("\n".join(lines))
    return folder


STEPS = 6


@pytest.fixture(scope="module")
def walked(place):
    """The road, walked once."""
    said = []
    road = run(place / "job.toml", place / "out", "onnx", said.append)
    return road, "\n".join(map(str, said))


def files(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_it_ends_with_an_adapter_and_says_how_to_load_it(walked):
    road, said = walked
    assert (road.lora("onnx") / "pytorch_lora_weights.safetensors").is_file()
    assert f"pipe.load_lora_weights({str(road.lora('onnx'))!r})" in said
    assert list(road.plan.targets) == ["onnx"]
    certificate = json.loads((road.bundle("onnx") / "parity.json").read_text())
    assert certificate["passed"]
    assert any("from their pictures" in line for line in certificate["bank"]["recomputed"])


def test_previews_are_the_base_models_with_the_adapter(walked, place):
    """The bundle has no loop's parts: its model's own pipeline paints."""
    road, _ = walked
    previews = road.run("onnx") / "previews"
    assert sorted(p.name for p in previews.iterdir()) == [f"{n:06d}-0.png" for n in (0, 3, 6)]
    (prompt,) = json.loads((previews.parent / "previews.json").read_text())["prompts"]
    model = model_of(road.plan)
    with adapted(load_pipeline(model.folder), road.lora("onnx")) as pipeline:
        (expected,) = model.family.sample(pipeline, prompt, road.plan.s_max, [0])
    found = np.asarray(Image.open(previews / "000006-0.png"))
    np.testing.assert_array_equal(found, np.asarray(expected))


def test_nothing_is_done_twice(walked, place):
    road, _ = walked
    before = files(road.out)
    run(place / "job.toml", road.out, "onnx", lambda _: None)
    after = files(road.out)
    redone = {p.relative_to(road.out).as_posix() for p in after if after[p] != before.get(p)}
    assert redone <= {
        f"run/{n}"
        for n in ("run.json", "state.safetensors", "loss.csv", "loss.png", "adapter.safetensors")
    }


def test_it_goes_on_where_training_was_stopped(walked, place, tmp_path, monkeypatch):
    road, _ = walked
    out = tmp_path / "out"
    shutil.copytree(road.out, out)
    for name in ("run", "lora"):
        shutil.rmtree(out / name)
    real = er.train
    stop = {"on_step": lambda done, _: done == 2}
    monkeypatch.setattr(er, "train", lambda *a, **k: real(*a, **k, **stop))
    with pytest.raises(KeyboardInterrupt):
        run(place / "job.toml", out, "onnx", lambda _: None)
    assert not (out / "lora").exists()
    stop.clear()
    run(place / "job.toml", out, "onnx", lambda _: None)
    name = "lora/pytorch_lora_weights.safetensors"
    assert (out / name).read_bytes() == (road.out / name).read_bytes()


def test_a_job_that_changed_is_refused_and_named(walked, place, tmp_path):
    road, _ = walked
    other = place / "changed.toml"
    other.write_text((place / "job.toml").read_text().replace("seed = 3", "seed = 7"))
    before = files(road.out)
    with pytest.raises(BadInput, match=r"train\.seed: 3 -> 7"):
        run(other, road.out, "onnx", lambda _: None)
    with pytest.raises(BadInput, match=r"command\.target: 'onnx' -> ''"):
        run(place / "job.toml", road.out, None, lambda _: None)
    assert files(road.out) == before


def test_a_folder_of_something_else_is_left_alone(place, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(BadInput, match="not the folder of a run"):
        run(place / "job.toml", tmp_path, "onnx", lambda _: None)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_bundle_that_does_not_match_stops_before_training(walked, place, tmp_path):
    road, _ = walked
    out = tmp_path / "out"
    shutil.copytree(road.out, out)
    for name in ("run", "lora"):
        shutil.rmtree(out / name)
    (out / "bundle" / "parity.json").unlink()
    (out / "bundle" / "onnx" / "train_step.onnx").write_bytes(b"not a model")
    with pytest.raises(CheckFailed, match="not what was exported"):
        run(place / "job.toml", out, "onnx", lambda _: None)
    assert not (out / "run").exists()


@pytest.mark.parametrize(
    "target", ["onnx:recompute", "onnx:streamed:int8", "onnx:streamed:float16"]
)
def test_a_target_that_the_job_does_not_export_is_refused_before_any_work(place, tmp_path, target):
    with pytest.raises(BadInput, match="does not export"):
        run(place / "job.toml", tmp_path / "out", target, lambda _: None)
    assert not (tmp_path / "out").exists()


def test_targets_as_an_export_has_them(walked):
    plan = walked[0].plan
    small = plan.model_copy(update={"weights": "int8", "recompute": True})
    assert exported_as(plan, "onnx") == "onnx"
    assert exported_as(plan, "onnx:streamed:float32") == "onnx:streamed"
    assert exported_as(small, "onnx:streamed:int8") == "onnx:streamed"
    assert exported_as(small, "executorch") == "executorch"
    with pytest.raises(BadInput, match="int8"):
        exported_as(small, "onnx:recompute")
