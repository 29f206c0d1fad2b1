"""The training loop: it learns, and a run stopped at any step ends with the same bits."""

import csv
import os
import re
import signal
import threading
import time
from math import isnan
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_dit.contract.adapter import read_adapter
from edge_dit.contract.bank import draw_order
from edge_dit.errors import BadInput
from edge_dit_runtime.run_folder import RunFolder
from edge_dit_runtime.training import Wait, train

STEPS = 12


@pytest.fixture(scope="module", params=["onnx", "ort-training"])
def whole(request, road, tmp_path_factory):
    """A run that never stopped: target and folder."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    train(road.bundle, road.bank, folder, target=request.param, steps=STEPS)
    return request.param, folder


def after(steps: int):
    """Stops a run after some steps."""
    return lambda done, _loss: done == steps


def bits(folder) -> dict[str, bytes]:
    return {
        name: v.tobytes() for name, v in read_adapter(folder / "adapter.safetensors")[0].items()
    }


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_stopped_at_any_step_and_resumed_gives_the_same_bits(road, whole, tmp_path, stop):
    target, reference = whole
    run = tmp_path / "run"
    train(road.bundle, road.bank, run, target=target, steps=STEPS, on_step=after(stop))
    assert not (run / "adapter.safetensors").exists()
    assert RunFolder(run).read().done == stop
    train(road.bundle, road.bank, run, target=target, resume=True)
    assert bits(run) == bits(reference)
    assert (run / "loss.csv").read_bytes() == (reference / "loss.csv").read_bytes()


def test_interrupt_ends_the_step_and_leaves_a_checkpoint(road, whole, tmp_path):
    target, reference = whole
    run = tmp_path / "run"

    def press(done, _loss):
        if done == 5:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = train(road.bundle, road.bank, run, target=target, steps=STEPS, on_step=press)
    assert stopped.done == 5
    train(road.bundle, road.bank, run, target=target, resume=True)
    assert bits(run) == bits(reference)


def test_killed_between_checkpoints_goes_on_from_the_last(road, whole, tmp_path, monkeypatch):
    """The process dies without a chance to save: steps since the checkpoint are repeated."""
    monkeypatch.setattr("edge_dit_runtime.training.SAVE_EVERY", 4)
    target, reference = whole
    run = tmp_path / "run"

    def die(done, _loss):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(road.bundle, road.bank, run, target=target, steps=STEPS, on_step=die)
    assert RunFolder(run).read().done == 4
    train(road.bundle, road.bank, run, target=target, resume=True)
    assert bits(run) == bits(reference)


def test_it_is_asked_before_every_step_and_told_after_the_last(road, whole, tmp_path):
    target, reference = whole
    asked: list[tuple[int, float]] = []
    train(
        road.bundle,
        road.bank,
        tmp_path / "run",
        target=target,
        steps=STEPS,
        on_step=lambda *step: asked.append(step),
    )
    assert [done for done, _ in asked] == list(range(STEPS + 1))
    assert isnan(asked[0][1])
    with (reference / "loss.csv").open() as file:
        assert [loss for _, loss in asked[1:]] == [float(r["loss"]) for r in csv.DictReader(file)]


def test_a_pause_keeps_every_step_and_ends_with_the_same_bits(road, whole, tmp_path):
    """Also before the first step: the device may be hot already."""
    target, reference = whole
    run, calls, kept = tmp_path / "run", [], {}

    def hot(done, _loss):
        calls.append(done)
        if done in (0, 5) and calls.count(done) < 3:
            if calls.count(done) == 2:
                kept[done] = RunFolder(run).read().done
            return Wait(seconds=0.05)
        return None

    started = time.monotonic()
    train(road.bundle, road.bank, run, target=target, steps=STEPS, on_step=hot)
    assert time.monotonic() - started > 4 * 0.05
    assert kept == {0: 0, 5: 5}
    assert (calls.count(0), calls.count(5), len(calls)) == (3, 3, STEPS + 5)
    assert bits(run) == bits(reference)


@pytest.mark.parametrize("when", [0, 5])
def test_killed_during_a_pause_loses_no_step(road, whole, tmp_path, when):
    target, reference = whole
    run, asked = tmp_path / "run", []

    def die(done, _loss):
        asked.append(done)
        if asked.count(when) == 2:
            raise KeyboardInterrupt
        return Wait(seconds=0) if done == when else None

    with pytest.raises(KeyboardInterrupt):
        train(road.bundle, road.bank, run, target=target, steps=STEPS, on_step=die)
    assert RunFolder(run).read().done == when
    train(road.bundle, road.bank, run, target=target, resume=True)
    assert bits(run) == bits(reference)


def test_ctrl_c_ends_a_pause(road, tmp_path):
    def endless(done, _loss):
        if done < 2:
            return None
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        return Wait(seconds=3600)

    started = time.monotonic()
    run = train(road.bundle, road.bank, tmp_path / "run", target="onnx", on_step=endless)
    assert run.done == 2
    assert time.monotonic() - started < 60


def test_the_example_of_the_documents_pauses(road, whole, tmp_path, monkeypatch):
    """That of docs/device.md, whose device cools down each time it is looked at."""
    target, reference = whole
    text = (Path(__file__).parents[2] / "docs" / "device.md").read_text()
    (example,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "def on_step" in b]
    (tmp_path / "power" / "mains").mkdir(parents=True)
    (tmp_path / "power" / "mains" / "online").write_text("1\n")
    monkeypatch.chdir(tmp_path)
    for name in ("bundle", "bank"):
        (tmp_path / name).symlink_to(getattr(road, name))
    degrees, waited = iter([43, 40, 39, 37, 40, 42, *[30] * STEPS]), []

    class Heat:
        def read_text(self) -> str:
            return f"{1000 * next(degrees)}\n"

    replaced = {
        'Path("/sys/class/power_supply")': f"Path({str(tmp_path / 'power')!r})",
        "seconds=30": "seconds=0.01",
        '"onnx:streamed"': repr(target),
        "def on_step": "HEAT = heat\n\n\ndef on_step",
    }
    for old, new in replaced.items():
        assert old in example
        example = example.replace(old, new)
    monkeypatch.setattr(RunFolder, "save", noting(RunFolder.save, waited))
    exec(example, {"heat": Heat(), "__name__": "example"})
    assert waited == [0, STEPS]  # one pause, before the first step; the end
    assert bits(tmp_path / "run") == bits(reference)


def noting(save, done: list[int]):
    """A run's ``save`` that also notes the steps done."""

    def save_and_note(self, session, run, log):
        done.append(len(log))
        save(self, session, run, log)

    return save_and_note


def test_stopped_before_the_first_step(road, whole, tmp_path):
    target, reference = whole
    run = tmp_path / "run"
    assert (
        train(road.bundle, road.bank, run, target=target, steps=STEPS, on_step=after(0)).done == 0
    )
    train(road.bundle, road.bank, run, target=target, resume=True)
    assert bits(run) == bits(reference)


def test_outputs(road, whole):
    _, folder = whole
    with (folder / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(STEPS))
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    tensors, run = RunFolder(folder).adapter()
    assert run.done == STEPS
    initial = read_adapter(road.bundle / "adapter.safetensors")[0]
    changed = [name for name, value in tensors.items() if (value != initial[name]).any()]
    assert len(changed) == len(initial)


def test_training_lowers_the_loss(road, tmp_path):
    train(road.bundle, road.bank, tmp_path / "run", target="onnx", steps=300)
    with (tmp_path / "run" / "loss.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    first, last = np.mean(losses[:10]), np.mean(losses[-10:])  # each is once over the bank
    assert last < 0.95 * first


def test_a_run_is_not_overwritten_nor_mixed_up(road, whole, tmp_path):
    target, folder = whole
    with pytest.raises(BadInput, match=r"(?s)a run is there already.*--resume"):
        train(road.bundle, road.bank, folder, target=target)
    other = {"onnx": "ort-training", "ort-training": "onnx"}[target]
    with pytest.raises(BadInput, match=f"a run of target {target}"):
        train(road.bundle, road.bank, folder, target=other, resume=True)
    with pytest.raises(BadInput, match="no run to resume"):
        train(road.bundle, road.bank, tmp_path / "new", target=target, resume=True)
    with pytest.raises(BadInput, match=r"no run\.json"):
        train(road.bundle, road.bank, road.bank, target=target)


def test_damaged_state_is_refused(road, tmp_path):
    run = tmp_path / "run"
    train(road.bundle, road.bank, run, target="onnx", steps=4, on_step=after(2))
    state = run / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(BadInput, match="damaged checkpoint"):
        train(road.bundle, road.bank, run, target="onnx", resume=True)
    with pytest.raises(BadInput, match="no whole checkpoint"):
        RunFolder(run).adapter()


def test_a_keyword_that_it_does_not_have(road, tmp_path):
    with pytest.raises(TypeError, match="no keyword 'any_memroy'"):
        train(road.bundle, road.bank, tmp_path / "run", any_memroy=True)  # type: ignore[call-arg]


def test_a_target_the_bundle_lacks(road, tmp_path):
    with pytest.raises(BadInput, match="no target 'coreml'"):
        train(road.bundle, road.bank, tmp_path / "run", target="coreml")
    assert not (tmp_path / "run").exists()


@given(draws=st.integers(1, 300), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 20))
def test_every_epoch_visits_every_draw_once(draws, seed, epoch):
    steps = range(epoch * draws, (epoch + 1) * draws)
    assert sorted(draw_order(step, draws, seed) for step in steps) == list(range(draws))
