import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from edge_dit_export.passes_onnx.conv1x1_to_matmul import conv1x1_to_matmul
from edge_dit_export.targets.onnx_model import onnx_model


class Convolutions(torch.nn.Module):
    """Two 1x1 convolutions, and three that are no matrix product of one image."""

    def __init__(self):
        super().__init__()
        self.with_bias = torch.nn.Conv2d(6, 10, 1)
        self.without = torch.nn.Conv2d(10, 6, 1, bias=False)
        self.depthwise = torch.nn.Conv2d(6, 6, 1, groups=6)
        self.strided = torch.nn.Conv2d(6, 6, 1, stride=2)
        self.wide = torch.nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        return self.wide(self.strided(self.depthwise(self.without(self.with_bias(x)))))


def test_only_plain_1x1_convolutions_become_products():
    x = torch.randn(1, 6, 5, 7)
    model = ir.to_proto(onnx_model(Convolutions().eval(), {"x": x}, ["y"]))
    before = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x.numpy()})
    assert [node.op_type for node in model.graph.node].count("Conv") == 5

    assert conv1x1_to_matmul(model) == 2
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("Conv"), kinds.count("MatMul")) == (3, 2)
    after = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(after[0], before[0], rtol=1e-5, atol=1e-6)


def test_a_batch_stays_a_convolution():
    x = torch.randn(2, 6, 5, 7)
    model = ir.to_proto(onnx_model(torch.nn.Conv2d(6, 4, 1), {"x": x}, ["y"]))
    assert conv1x1_to_matmul(model) == 0
