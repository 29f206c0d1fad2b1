"""What a plan asks of the loop: schedule, groups of draws, average. A stop changes no bit of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bundles
from edge_dit.contract.adapter import read_adapter
from edge_dit.errors import BadInput
from edge_dit.store.tensors import TensorFile
from edge_dit_runtime.run_folder import RunFolder
from edge_dit_runtime.sessions.smoothed import average_decay
from edge_dit_runtime.training import train

STEPS = 12
CHOICES = {
    "course": {"schedule": "cosine", "warmup": 5},
    "groups": {"accumulate": 3},
    "average": {"ema": 0.3},
    "all": {"schedule": "linear", "warmup": 5, "accumulate": 4, "ema": 0.3},
}


@pytest.fixture(scope="module", params=CHOICES)
def chosen(request, road, tmp_path_factory):
    """A bundle whose plan has one of `CHOICES`."""
    folder = tmp_path_factory.mktemp("chosen") / "bundle"
    return request.param, bundles.with_plan(road.bundle, folder, **CHOICES[request.param])


def stopping(*steps: int):
    """Stops a run after each of some steps."""
    return lambda done, _loss: done in steps


@pytest.mark.parametrize("target", ["onnx", "ort-training"])
def test_stopped_and_resumed_gives_the_same_bits(road, chosen, tmp_path, target):
    """Stops within groups, between them, and on the way up."""
    _, bundle = chosen
    train(bundle, road.bank, tmp_path / "whole", target=target, steps=STEPS)
    stopped = tmp_path / "stopped"
    train(bundle, road.bank, stopped, target=target, steps=STEPS, on_step=stopping(1))
    for step in (2, 3, 4, 7, 11):
        train(bundle, road.bank, stopped, target=target, resume=True, on_step=stopping(step))
        assert RunFolder(stopped).read().done == step
    train(bundle, road.bank, stopped, target=target, resume=True)
    for name in ("state.safetensors", "adapter.safetensors", "loss.csv"):
        assert (stopped / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_choice_changes_what_is_learned(road, chosen, tmp_path):
    name, bundle = chosen
    for run, made in (("plain", road.bundle), ("chosen", bundle)):
        train(made, road.bank, tmp_path / run, target="onnx", steps=STEPS)
    plain, found = (
        read_adapter(tmp_path / run / "adapter.safetensors")[0] for run in ("plain", "chosen")
    )
    assert all((found[key] != value).any() for key, value in plain.items())
    state = TensorFile(tmp_path / "chosen" / "state.safetensors").read()
    assert state["step"].tolist() == [STEPS // CHOICES[name].get("accumulate", 1)]


def test_a_run_gives_the_average(road, tmp_path):
    bundle = bundles.with_plan(road.bundle, tmp_path / "bundle", ema=0.3)
    train(bundle, road.bank, tmp_path / "run", target="onnx", steps=3)
    state = TensorFile(tmp_path / "run" / "state.safetensors").read()
    saved, _ = RunFolder(tmp_path / "run").adapter()
    written = read_adapter(tmp_path / "run" / "adapter.safetensors")[0]
    for name, value in written.items():
        np.testing.assert_array_equal(value, state[f"ema.{name}"])
        np.testing.assert_array_equal(saved[name], value)
        assert (value != state[f"adapter.{name}"]).any()


def test_a_skipped_draw_is_no_part_of_a_group(road, tmp_path, monkeypatch):
    """Groups are of draws that count; within one, the state has their sum."""
    from edge_dit_runtime.sessions.graph import GraphSession

    done, backward = [], GraphSession.backward

    def sometimes_nan(self, draw):
        done.append(backward(self, draw))
        return float("nan") if len(done) == 2 else done[-1]

    bundle = bundles.with_plan(road.bundle, tmp_path / "bundle", accumulate=3)
    monkeypatch.setattr(GraphSession, "backward", sometimes_nan)
    train(bundle, road.bank, tmp_path / "run", target="onnx", steps=6)
    state = TensorFile(tmp_path / "run" / "state.safetensors").read()
    assert (state["step"].tolist(), state["summed"].tolist()) == ([1], [2])
    assert any(value.any() for name, value in state.items() if name.startswith("sum."))


def test_steps_are_whole_groups(road, tmp_path):
    bundle = bundles.with_plan(road.bundle, tmp_path / "bundle", accumulate=5)
    with pytest.raises(BadInput, match="every update takes 5 draws") as caught:
        train(bundle, road.bank, tmp_path / "run", target="onnx", steps=STEPS)
    assert "take 15" in caught.value.remedy
    assert not (tmp_path / "run").exists()


@given(decay=st.floats(0.01, 0.9999), updates=st.integers(1, 10**6))
def test_the_average_follows_closely_at_first(decay, updates):
    found = average_decay(decay, updates)
    assert found == min(decay, (1 + updates) / (10 + updates))
    assert found <= average_decay(decay, updates + 1) <= decay
