import torch
from rewriting import ops, rewrite, trace, train_step
from torch.nn.functional import conv2d

from edge_dit_export.passes.conv1x1_to_mm import conv1x1_to_mm


def test_train_step_keeps_only_depthwise_convolutions():
    before, after, count = rewrite(train_step(), conv1x1_to_mm, tolerance=1e-5)
    # Two blocks, each: two frozen 1x1 convolutions, the four of their LoRA, and a depthwise one.
    assert (before["convolution"], before["convolution_backward"]) == (14, 14)
    assert (after["convolution"], after["convolution_backward"]) == (2, 2)
    assert count == 24
    # A product each way, and one for the gradient of every LoRA weight.
    assert after["mm"] == before["mm"] + 24 + 8


def test_gradients_of_a_trained_weight():
    def gradients(x, weight):
        x, weight = x.requires_grad_(), weight.requires_grad_()
        with torch.enable_grad():
            both = torch.autograd.grad(conv2d(x, weight).square().sum(), (x, weight))
        return torch.cat([gradient.flatten() for gradient in both])

    torch.manual_seed(0)
    graph = trace(gradients, torch.randn(1, 5, 3, 4), torch.randn(7, 5, 1, 1))
    before, after, _ = rewrite(graph, conv1x1_to_mm, tolerance=1e-5)
    assert before["convolution_backward"] == 1
    assert after["convolution_backward"] == 0


def test_bias_is_added_per_channel():
    torch.manual_seed(0)
    graph = trace(conv2d, torch.randn(1, 5, 3, 4), torch.randn(7, 5, 1, 1), torch.randn(7))
    _, after, count = rewrite(graph, conv1x1_to_mm, tolerance=1e-6)
    assert count == 1
    assert after["convolution"] == 0


def test_channels_last_input():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 4, 5).permute(0, 3, 1, 2)
    _, after, _ = rewrite(trace(conv2d, x, torch.randn(7, 5, 1, 1)), conv1x1_to_mm, tolerance=1e-6)
    assert after["convolution"] == 0


def test_other_convolutions_are_left():
    x, pointwise = torch.randn(1, 6, 4, 4), torch.randn(6, 6, 1, 1)
    for function in (
        lambda x: conv2d(x, torch.ones(6, 6, 3, 3)),
        lambda x: conv2d(x, pointwise, stride=2),
        lambda x: conv2d(x, pointwise, padding=1),
        lambda x: conv2d(x, torch.ones(6, 3, 1, 1), groups=2),
        lambda x: conv2d(x.expand(2, 6, 4, 4), pointwise),
    ):
        graph = trace(function, x)
        _, _, count = rewrite(graph, conv1x1_to_mm)
        assert count == 0
        assert ops(graph[0])["convolution"] == 1
