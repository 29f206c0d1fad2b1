import numpy as np
import pytest
from onnx_graphs import kinds, parsed, run
from onnx_ir.passes.common import ShapeInferencePass

from edge_dit_export.passes_onnx import recompute_cheap as module
from edge_dit_export.passes_onnx.recompute_cheap import recompute_cheap

STEP = """
    g (float[3, 4] x, float[4, 4] w, float[3, 4] target)
        => (float loss, float[4, 4] grad)
    <int64[1] axis = {0}>
    {
        h = MatMul (x, w)
        s = Sigmoid (h)
        y = Mul (h, s)
        error = Sub (y, target)
        squares = Mul (error, error)
        rows = ReduceSum <keepdims = 0> (squares)
        loss = Identity (rows)
        double = Add (error, error)
        slope = Mul (s, y)
        other = Mul (slope, h)
        both = Mul (double, other)
        turned = Transpose <perm = [1, 0]> (x)
        grad = MatMul (turned, both)
    }
"""


@pytest.fixture(autouse=True)
def everything_counts(monkeypatch):
    monkeypatch.setattr(module, "LEAST", 1)


def step():
    return ShapeInferencePass()(parsed(STEP)).model


def feeds():
    rng = np.random.default_rng(0)
    shapes = {"x": (3, 4), "w": (4, 4), "target": (3, 4)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def late_readers(model):
    """Nodes after the loss that read what a node before it computed, by operator."""
    nodes = list(model.graph)
    end = next(i for i, node in enumerate(nodes) if node.outputs[0].name == "loss")
    early = {value.name for node in nodes[: end + 1] for value in node.outputs}
    return {
        value.producer().op_type
        for node in nodes[end + 1 :]
        for value in node.inputs
        if value is not None and value.name in early
    }


def test_cheap_values_are_computed_again_after_the_loss():
    model = step()
    before = run(model, feeds())
    assert late_readers(model) == {"MatMul", "Sigmoid", "Mul", "Sub"}
    assert recompute_cheap(model, "loss", "target") > 0
    # The product is what is kept; the error belongs to the backward pass.
    assert "Sigmoid" not in late_readers(model)
    assert kinds(model).count("Sigmoid") == 2
    assert kinds(model).count("MatMul") == 2
    for one, other in zip(before, run(model, feeds()), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_computed_again_waits_for_the_gradient():
    model = step()
    recompute_cheap(model, "loss", "target")
    again = [node for node in model.graph if node.op_type == "Sigmoid"][1]
    waiting = again.inputs[0].producer()
    assert waiting.op_type == "Reshape"
    seen, frontier = set(), [waiting.inputs[1]]
    while frontier:
        node = frontier.pop().producer()
        if node is not None and node not in seen:
            seen.add(node)
            frontier += [value for value in node.inputs if value is not None]
    assert "double" in {value.name for node in seen for value in node.outputs}


def test_small_values_are_kept(monkeypatch):
    monkeypatch.setattr(module, "LEAST", 2**19)
    model = step()
    assert recompute_cheap(model, "loss", "target") == 0
