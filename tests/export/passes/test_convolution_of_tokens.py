import pytest
import torch
from rewriting import rewrite, trace, train_step

from edge_dit_export.passes import FOR_ONNX, apply
from edge_dit_export.targets.convolution_of_tokens import convolution_of_tokens

aten = torch.ops.aten


def test_train_step():
    graph = train_step()
    apply(graph[0], FOR_ONNX)
    before, after, count = rewrite(graph, convolution_of_tokens, tolerance=1e-5)
    # The depthwise convolutions of two blocks, and their gradients.
    assert (count, before["convolution"], after["convolution"]) == (4, 4, 0)
    assert after["convolution_of_tokens"] == 4
    assert after["permute"] <= before["permute"] - 8


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_any_kind(bias):
    def function(x, weight, b):
        image = x.permute(0, 3, 1, 2)
        y = aten.convolution(
            image, weight, b if bias else None, [2, 1], [1, 0], [1, 2], False, [0, 0], 2
        )
        return y.permute(0, 2, 3, 1).contiguous()

    inputs = torch.randn(1, 7, 9, 4), torch.randn(6, 2, 3, 3), torch.randn(6)
    _, after, count = rewrite(trace(function, *inputs), convolution_of_tokens, tolerance=1e-6)
    assert (count, after["convolution"], after["permute"]) == (1, 0, 0)


def test_an_image_that_is_read_as_one_stays():
    def function(x, weight):
        y = aten.convolution(x.permute(0, 3, 1, 2), weight, None, [1, 1], [1, 1], [1, 1], False,
            [0, 0], 1)  # fmt: skip
        return y.permute(0, 2, 3, 1) + 1.0, y * 2.0

    inputs = torch.randn(1, 5, 6, 4), torch.randn(3, 4, 3, 3)
    _, _, count = rewrite(
        trace(lambda *a: torch.cat([t.flatten() for t in function(*a)]), *inputs),
        convolution_of_tokens,
    )
    assert count == 0
