import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from edge_dit_export.passes_onnx.complete_layer_norm import complete_layer_norm
from edge_dit_export.targets.onnx_model import onnx_model


class Norms(torch.nn.Module):
    """Two without scale, which share the exporter's constant; one with a scale from outside."""

    def forward(self, x, scale):
        norm = torch.nn.functional.layer_norm
        return norm(norm(norm(x, [8]) + 1, [8]) * 2, [8], weight=scale)


def test_every_layer_norm_has_its_own_scale_bias_and_statistics():
    inputs = {"x": torch.randn(2, 8), "scale": torch.randn(8)}
    model = ir.to_proto(onnx_model(Norms(), inputs, ["y"]))
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    before = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0]
    assert len({n.input[1] for n in model.graph.node if n.op_type == "LayerNormalization"}) == 2

    complete_layer_norm(model)
    norms = [n for n in model.graph.node if n.op_type == "LayerNormalization"]
    assert [(len(n.input), len(n.output)) for n in norms] == [(3, 3)] * 3
    affine = [name for n in norms for name in n.input[1:]]
    assert len(set(affine)) == len(affine)
    onnx.checker.check_model(model, full_check=True)
    after = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0]
    np.testing.assert_array_equal(after, before)
