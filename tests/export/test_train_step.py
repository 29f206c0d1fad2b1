import itertools
import re

import torch

import tiny
from edge_dit_export.graph.train_step import run, trace_train_step


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


def behind(node):
    """Every node that has to run before ``node``."""
    seen, todo = set(), [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                todo.append(source)
    return seen


def test_a_block_is_computed_again_only_when_the_one_above_is_done():
    """Whatever the order in which a runtime runs what it may: LoRA gradients of a block need those
    of the block above.
    """
    sub, batch, _ = tiny.traced()
    step = trace_train_step(sub, batch, recompute=True)
    tiny.assert_close(tiny.eager(sub, batch), run(step, step.inputs), 1e-5)
    (outputs,) = next(iter(reversed(step.module.graph.nodes))).args
    found = dict(zip(step.outputs, outputs, strict=True))
    blocks = {}
    for name, node in found.items():
        if number := re.search(r"blocks\.(\d+)\.", name):
            blocks.setdefault(int(number[1]), []).append(node)
    order = sorted(blocks, reverse=True)
    assert len(order) > 1
    for above, below in itertools.pairwise(order):
        for gradient in blocks[below]:
            assert set(blocks[above]) <= behind(gradient)
