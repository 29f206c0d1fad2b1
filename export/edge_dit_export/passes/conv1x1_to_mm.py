"""Rewrite 1x1 convolutions as matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edge_dit_export.passes._graph import (
    calls,
    image_of,
    insert,
    replace_with_image,
    shape,
    tokens_of,
)

aten: Any = torch.ops.aten


def conv1x1_to_mm(module: fx.GraphModule) -> int:
    """Write a 1x1 convolution of one image, and its gradients, as products of its tokens:

        y = x W^T + b    dx = dy W    dW = dy^T x    x [H W, C], W [O, C], y [H W, O]

    Tokens are rows, as in linear layers, so that both kinds of layers become the same products;
    `tokens_last` then removes the permutes between them. ExecuTorch 1.5.1's convolution is hundreds
    of times slower than torch's on these, its convolution_backward has no kernel at all, and ONNX
    has none for convolution_backward either.

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
        y = insert(node, aten.mm.default, tokens_of(node, x), _turned(node, _matrix(node, weight)))
        if bias is not None:
            y = insert(node, aten.add.Tensor, y, bias)
        replace_with_image(node, image_of(node, y, shape(x)[2:]))
        count += 1
    return count


def _backward(module: fx.GraphModule) -> int:
    count = 0
    for node in calls(module, aten.convolution_backward.default):
        dy, x, weight, _bias_sizes, *settings, mask = node.args
        if mask[2] or not _is_product(x, weight, settings):
            continue
        given = tokens_of(node, dy)
        gradients = {}
        if mask[0]:
            dx = insert(node, aten.mm.default, given, _matrix(node, weight))
            gradients[0] = image_of(node, dx, shape(x)[2:])
        if mask[1]:
            dw = insert(node, aten.mm.default, _turned(node, given), tokens_of(node, x))
            gradients[1] = insert(node, aten.view.default, dw, list(shape(weight)))
        for item in list(node.users):
            if item.args[1] in gradients:  # the bias has none
                replace_with_image(item, gradients[item.args[1]])
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


def _matrix(before: fx.Node, weight: fx.Node) -> fx.Node:
    return insert(before, aten.view.default, weight, list(shape(weight)[:2]))


def _turned(before: fx.Node, matrix: fx.Node) -> fx.Node:
    return insert(before, aten.permute.default, matrix, [1, 0])
