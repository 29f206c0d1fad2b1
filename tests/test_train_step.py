import torch

import tiny
from edge_dit_export.train_step import run


def test_traced_step_equals_autograd():
    sub, batch, step = tiny.traced()
    tiny.assert_close(tiny.eager(sub, batch), run(step, step.inputs), 1e-5)


def test_traced_step_follows_its_inputs():
    sub, batch, step = tiny.traced()
    other = {**batch, "entry": batch["entry"] * 1.5, "target": torch.zeros_like(batch["target"])}
    tiny.assert_close(tiny.eager(sub, other), run(step, {**step.inputs, **other}), 1e-5)


def test_frozen_weights_are_not_inputs():
    _, _, step = tiny.traced()
    placeholders = [node for node in step.module.graph.nodes if node.op == "placeholder"]
    assert len(placeholders) == len(step.inputs)
    assert not any("base_layer" in name for name in step.inputs)
