import numpy as np
import torch
from onnx_graphs import kinds, parsed, run
from onnx_ir.passes.common import ShapeInferencePass

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


def exported(module, x):
    return ShapeInferencePass()(onnx_model(module.eval(), {"x": x}, ["y"])).model


def test_only_plain_1x1_convolutions_become_products():
    x = torch.randn(1, 6, 5, 7)
    model = exported(Convolutions(), x)
    before = run(model, {"x": x})
    assert kinds(model) == ["Conv"] * 5

    assert conv1x1_to_matmul(model) == 2
    # The exporter gives the one without a bias zeros.
    product = ["Reshape", "Reshape", "MatMul", "Reshape", "Add", "Reshape"]
    assert kinds(model) == [*product, *product, "Conv", "Conv", "Conv"]
    np.testing.assert_allclose(run(model, {"x": x})[0], before[0], rtol=1e-5, atol=1e-6)


def test_without_a_bias_nothing_is_added():
    feeds = {"x": torch.randn(1, 6, 5, 7), "w": torch.randn(4, 6, 1, 1)}
    model = parsed("""
        g (float[1, 6, 5, 7] x, float[4, 6, 1, 1] w) => (float[1, 4, 5, 7] y) { y = Conv (x, w) }
    """)
    before = run(model, feeds)
    assert conv1x1_to_matmul(model) == 1
    assert kinds(model) == ["Reshape", "Reshape", "MatMul", "Reshape"]
    np.testing.assert_allclose(run(model, feeds)[0], before[0], rtol=1e-5, atol=1e-6)


def test_a_batch_stays_a_convolution():
    model = exported(torch.nn.Conv2d(6, 4, 1), torch.randn(2, 6, 5, 7))
    assert conv1x1_to_matmul(model) == 0
    assert kinds(model) == ["Conv"]
