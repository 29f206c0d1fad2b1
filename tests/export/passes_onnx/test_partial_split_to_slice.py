import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from edge_dit_export.passes_onnx.partial_split_to_slice import partial_split_to_slice
from edge_dit_export.targets.onnx_model import onnx_model


class Parts(torch.nn.Module):
    """The first and last of three parts of x; both halves of y."""

    def forward(self, x, y):
        first, _, last = x.chunk(3, dim=-1)
        one, two = y.split([2, 5], dim=0)
        return first * last, one.sum() + two.sum()


def test_only_a_split_with_an_unused_part_becomes_slices():
    inputs = {"x": torch.randn(2, 12), "y": torch.randn(7, 3)}
    model = ir.to_proto(onnx_model(Parts(), inputs, ["product", "sum"]))
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    before = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("Split"), kinds.count("Slice")) == (2, 0)

    assert partial_split_to_slice(model) == 1
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("Split"), kinds.count("Slice")) == (1, 2)
    after = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)
    for want, have in zip(before, after, strict=True):
        np.testing.assert_array_equal(have, want)
