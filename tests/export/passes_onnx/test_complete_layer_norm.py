import numpy as np
import pytest
import torch
from onnx_graphs import parsed, run

from edge_dit_export.passes_onnx.complete_layer_norm import complete_layer_norm
from edge_dit_export.targets.onnx_model import onnx_model


class Norms(torch.nn.Module):
    """Two without scale, which share the exporter's constant; one with a scale from outside."""

    def forward(self, x, scale):
        norm = torch.nn.functional.layer_norm
        return norm(norm(norm(x, [8]) + 1, [8]) * 2, [8], weight=scale)


def test_every_layer_norm_has_its_own_scale_bias_and_statistics():
    inputs = {"x": torch.randn(2, 8), "scale": torch.randn(8)}
    model = onnx_model(Norms(), inputs, ["y"])
    before = run(model, inputs)[0]
    norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert [(len(n.inputs), len(n.outputs)) for n in norms] == [(2, 1)] * 3
    shared, again, own = (node.inputs[1] for node in norms)
    assert shared is again
    assert shared is not own

    complete_layer_norm(model)
    assert [(len(n.inputs), len(n.outputs)) for n in norms] == [(3, 3)] * 3
    affine = [value.name for n in norms for value in n.inputs[1:]]
    assert len(set(affine)) == len(affine)
    assert norms[2].inputs[1] is own
    assert shared.name not in model.graph.initializers  # nothing reads it any more
    np.testing.assert_array_equal(run(model, inputs)[0], before)


def test_a_scale_of_unknown_shape_is_refused():
    model = parsed("""
        g (float[2, 8] x, float[8] scale) => (float[2, 8] y)
        { double = Add (scale, scale) y = LayerNormalization <axis = 1> (x, double) }
    """)
    with pytest.raises(ValueError, match="scale has no known shape"):
        complete_layer_norm(model)
