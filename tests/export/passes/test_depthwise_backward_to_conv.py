import pytest
import torch
from rewriting import rewrite, train_step
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from edge_dit_export.passes import copy_of
from edge_dit_export.passes.depthwise_backward_to_conv import depthwise_backward_to_conv


def test_train_step():
    graph = train_step()
    before, after, count = rewrite(graph, depthwise_backward_to_conv, tolerance=1e-5)
    assert count == 2
    assert after["convolution_backward"] == before["convolution_backward"] - 2
    assert after["convolution"] == before["convolution"] + 2
    turned = [name for name, _ in graph[0].named_buffers() if name.endswith("__turned")]
    assert len(turned) == 2


class _Gradient(nn.Module):
    """d sum(conv(x) * dy) / dx with a frozen depthwise kernel that has no symmetry."""

    def __init__(self, kernel: tuple[int, int], padding: tuple[int, int], stride: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(3, 1, *kernel, generator=generator))
        self.padding, self.stride = padding, stride

    def forward(self, x, dy):
        return torch.ops.aten.convolution_backward(
            dy, x, self.weight, [0], [self.stride] * 2, self.padding, [1, 1], False, [0, 0], 3,
            [True, False, False],
        )[:1]  # fmt: skip


def _graph(module, side, out):
    inputs = [torch.randn(1, 3, *side), torch.randn(1, 3, *out)]
    return copy_of(make_fx(module)(*inputs)), inputs


@pytest.mark.parametrize(
    ("kernel", "padding", "out"),
    [((3, 3), (1, 1), (6, 7)), ((3, 3), (0, 0), (4, 5)), ((5, 3), (2, 0), (6, 5))],
)
def test_kernels_and_paddings(kernel, padding, out):
    graph = _graph(_Gradient(kernel, padding), (6, 7), out)
    _, after, count = rewrite(graph, depthwise_backward_to_conv, tolerance=1e-6)
    assert count == 1
    assert after["convolution_backward"] == 0


def test_strided_gradients_are_left():
    graph = _graph(_Gradient((3, 3), (1, 1), stride=2), (6, 6), (3, 3))
    _, after, count = rewrite(graph, depthwise_backward_to_conv)
    assert count == 0
    assert after["convolution_backward"] == 1
