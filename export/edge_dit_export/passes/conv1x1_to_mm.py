"""Rewrite 1x1 convolutions as matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edge_dit_export.passes._graph import calls, insert, replace, shape, value

aten: Any = torch.ops.aten


def conv1x1_to_mm(module: fx.GraphModule) -> int:
    """Write a 1x1 convolution of one image, and its gradients, as products:

        y = W x + b    dx = W^T dy    dW = dy x^T    x [C, H W], W [O, C], y [O, H W]

    The weight is the left factor, so that no feature map is transposed. ExecuTorch 1.5.1's
    convolution is hundreds of times slower than torch's on these, its convolution_backward has no
    kernel at all, and ONNX has none for convolution_backward either.

    Returns:
        Number of convolutions and gradients rewritten.
    """
    return _forward(module) + _backward(module)


def _forward(module: fx.GraphModule) -> int:
    count = 0
    for node in calls(module, aten.convolution.default):
        x, weight, bias, *settings = node.args
        if not _is_product(x, weight, settings):
            continue
        _, channels, rows, columns = shape(x)
        outputs = shape(weight)[0]
        flat = insert(node, aten.view.default, _contiguous(node, x), [channels, rows * columns])
        matrix = insert(node, aten.view.default, weight, [outputs, channels])
        y = insert(node, aten.mm.default, matrix, flat)
        if bias is not None:
            y = insert(node, aten.add.Tensor, y, insert(node, aten.unsqueeze.default, bias, 1))
        replace(node, insert(node, aten.view.default, y, [1, outputs, rows, columns]))
        count += 1
    return count


def _backward(module: fx.GraphModule) -> int:
    count = 0
    for node in calls(module, aten.convolution_backward.default):
        dy, x, weight, _bias_sizes, *settings, mask = node.args
        if mask[2] or not _is_product(x, weight, settings):
            continue
        _, channels, rows, columns = shape(x)
        outputs = shape(weight)[0]
        flat = insert(node, aten.view.default, _contiguous(node, dy), [outputs, rows * columns])
        gradients = {}
        if mask[0]:
            matrix = insert(node, aten.view.default, weight, [outputs, channels])
            transposed = insert(node, aten.permute.default, matrix, [1, 0])
            dx = insert(node, aten.mm.default, transposed, flat)
            gradients[0] = insert(node, aten.view.default, dx, [1, channels, rows, columns])
        if mask[1]:
            seen = insert(node, aten.view.default, _contiguous(node, x), [channels, rows * columns])
            turned = insert(node, aten.permute.default, seen, [1, 0])
            dw = insert(node, aten.mm.default, flat, turned)
            gradients[1] = insert(node, aten.view.default, dw, [outputs, channels, 1, 1])
        for item in list(node.users):
            if item.args[1] in gradients:  # the bias has none
                replace(item, gradients[item.args[1]])
        module.graph.eliminate_dead_code()
        count += 1
    return count


def _is_product(x: fx.Node, weight: fx.Node, settings: list[Any]) -> bool:
    stride, padding, _dilation, transposed, _output_padding, groups = settings
    return (
        shape(x)[0] == 1
        and shape(weight)[2:] == (1, 1)
        and (list(stride), list(padding), transposed, groups) == ([1, 1], [0, 0], False, 1)
    )


def _contiguous(before: fx.Node, node: fx.Node) -> fx.Node:
    """Channels-last results of torch's own convolutions cannot be viewed as [C, H W]."""
    if value(node).is_contiguous():
        return node
    return insert(before, aten.clone.default, node, memory_format=torch.contiguous_format)
