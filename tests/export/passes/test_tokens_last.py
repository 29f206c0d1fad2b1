import torch
from rewriting import ops, rewrite, trace
from torch.nn.functional import conv2d, silu

from edge_dit_export.passes.conv1x1_to_mm import conv1x1_to_mm
from edge_dit_export.passes.merge_shape_ops import merge_shape_ops
from edge_dit_export.passes.tokens_last import tokens_last


def feed_forward(tokens, wide, depth, narrow):
    """SANA's: 1x1, depthwise, gate, 1x1."""
    image = tokens.view(1, 3, 4, 5).permute(0, 3, 1, 2)
    image = conv2d(silu(conv2d(image, wide)), depth, padding=1, groups=8)
    value, gate = image.chunk(2, dim=1)
    return conv2d(value * silu(gate), narrow).flatten(2).permute(0, 2, 1)


def weights():
    torch.manual_seed(0)
    tokens = torch.randn(1, 12, 5)
    return tokens, torch.randn(8, 5, 1, 1), torch.randn(8, 1, 3, 3), torch.randn(6, 4, 1, 1)


def with_gradient(tokens, *more):
    tokens = tokens.requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(feed_forward(tokens, *more).square().sum(), tokens)[0]


def all_three(module):
    return conv1x1_to_mm(module) + tokens_last(module) + merge_shape_ops(module)


def test_only_the_depthwise_convolution_sees_images():
    _, after, _ = rewrite(trace(feed_forward, *weights()), all_three, tolerance=1e-5)
    assert after["convolution"] == 1
    assert after["permute"] == 2 + 2  # around the depthwise one, and two weights turned


def test_what_is_computed_stays_the_same():
    graph = trace(with_gradient, *weights())
    _, after, count = rewrite(graph, tokens_last, tolerance=1e-5)
    assert count > 0
    assert after["sigmoid"] == ops(graph[0])["sigmoid"]


def test_what_mixes_rows_and_columns_is_left():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 4, 3, 5), torch.randn(4, 1, 3, 3)

    def rows(x):
        image = conv2d(x, weight, padding=1, groups=4)
        return torch.cat([image, image], dim=2) + image.mean(dim=(2, 3), keepdim=True)

    _, _, count = rewrite(trace(rows, x), tokens_last, tolerance=1e-6)
    assert count == 0
