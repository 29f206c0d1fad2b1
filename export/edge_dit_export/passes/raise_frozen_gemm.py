"""Rewrite products with a frozen matrix as layers that XNNPACK takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edge_dit_export.passes._graph import add_buffer, calls, frozen, insert, replace

aten: Any = torch.ops.aten


def raise_frozen_gemm(module: fx.GraphModule) -> int:
    """Write every matrix product with a frozen factor W [n, k] as a linear layer, or as a product
    whose right factor is the matrix as it is stored:

        mm(x, W^T)           -> linear(x, W)              addmm(b, x, W^T) -> linear(x, W, b)
        mm(dy, W)            -> mm(dy, W)                 addmm(b, dy, W)  -> mm(dy, W) + b
        mm(W, x)             -> linear(x^T, W)^T
        mm(W^T, dy)          -> mm(dy^T, W)^T

    `edge_dit_export.targets.xnnpack` delegates both. It would not take a weight after a permute or
    a view for a constant, and ExecuTorch 1.5.1's portable kernels are many times slower: addmm is
    ~45 times slower than torch's.

    Returns:
        Number of products rewritten, or in that form already.
    """
    count = 0
    for node in calls(module, aten.mm.default, aten.addmm.default):
        *bias, left, right = node.args
        if (factor := _weight(module, node, right)) is not None:
            weight, flipped = factor
            replace(node, _product(node, left, weight, flipped, bias))
        elif not bias and (factor := _weight(module, node, left)) is not None:
            weight, flipped = factor
            turned = insert(node, aten.permute.default, right, [1, 0])
            product = _product(node, turned, weight, not flipped, [])
            replace(node, insert(node, aten.permute.default, product, [1, 0]))
        else:
            continue
        count += 1
    module.graph.eliminate_dead_code()
    return count


def _product(
    before: fx.Node, x: fx.Node, weight: fx.Node, flipped: bool, bias: list[fx.Node]
) -> fx.Node:
    """The product x W^T + bias where W is ``flipped``, else x W + bias; the bias may be missing."""
    if flipped:
        return insert(before, aten.linear.default, x, weight, *bias)
    product = insert(before, aten.mm.default, x, weight)
    return insert(before, aten.add.Tensor, product, *bias) if bias else product


def _weight(
    module: fx.GraphModule, before: fx.Node, factor: fx.Node
) -> tuple[fx.Node, bool] | None:
    """The buffer of a frozen ``factor``, and whether it is transposed; else None."""
    flipped, node = False, factor
    shape_of_matrix = None
    while node.op == "call_function":
        if node.target is aten.permute.default and node.args[1] == [1, 0]:
            flipped = not flipped
        elif node.target is aten.view.default and shape_of_matrix is None:
            shape_of_matrix = node.args[1]  # a 1x1 convolution's [O, C, 1, 1] as [O, C]
        else:
            return None
        node = node.args[0]  # type: ignore[assignment]
    tensor = frozen(module, node)
    if tensor is None:
        return None
    if shape_of_matrix is not None:
        name = f"{node.target}__matrix"
        node = add_buffer(module, before, name, tensor.view(shape_of_matrix))
    return node, flipped
