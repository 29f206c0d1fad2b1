"""Products with a frozen matrix as linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edge_dit_export.passes._graph import add_buffer, calls, frozen, insert, replace

aten: Any = torch.ops.aten


def raise_frozen_gemm(module: fx.GraphModule) -> int:
    """Write every matrix product with a frozen factor W [n, k] as a linear layer:

        mm(x, W^T)           -> linear(x, W)              addmm(b, x, W^T) -> linear(x, W, b)
        mm(dy, W)            -> linear(dy, W_T)           W_T: a transposed copy
        mm(W, x)             -> linear(x^T, W)^T
        mm(W^T, dy)          -> linear(dy^T, W_T)^T

    ExecuTorch 1.5.1's XNNPACK partitioner takes only linear layers whose weight is a constant
    itself; behind a permute it is none, and the portable kernels are many times slower. Its addmm
    kernel is ~45 times slower than torch's, so none may stay. The price is W stored twice.

    Returns:
        Number of products rewritten.
    """
    count = 0
    for node in calls(module, aten.mm.default, aten.addmm.default):
        *bias, left, right = node.args
        if (weight := _weight(module, node, right, transposed=True)) is not None:
            replace(node, insert(node, aten.linear.default, left, weight, *bias))
        elif not bias and (weight := _weight(module, node, left, transposed=False)) is not None:
            flipped = insert(node, aten.permute.default, right, [1, 0])
            product = insert(node, aten.linear.default, flipped, weight)
            replace(node, insert(node, aten.permute.default, product, [1, 0]))
        else:
            continue
        count += 1
    module.graph.eliminate_dead_code()
    return count


def _weight(
    module: fx.GraphModule, before: fx.Node, factor: fx.Node, *, transposed: bool
) -> fx.Node | None:
    """A buffer that holds ``factor`` (or its transpose), if that is frozen."""
    flips, node = transposed, factor
    shape_of_matrix = None
    while node.op == "call_function":
        if node.target is aten.permute.default and node.args[1] == [1, 0]:
            flips = not flips
        elif node.target is aten.view.default and shape_of_matrix is None:
            shape_of_matrix = node.args[1]  # a 1x1 convolution's [O, C, 1, 1] as [O, C]
        else:
            return None
        node = node.args[0]  # type: ignore[assignment]
    tensor = frozen(module, node)
    if tensor is None:
        return None
    if shape_of_matrix is None and not flips:
        return node
    matrix = tensor if shape_of_matrix is None else tensor.view(shape_of_matrix)
    name = f"{node.target}__{'transposed' if flips else 'matrix'}"
    return add_buffer(module, before, name, matrix.T.contiguous() if flips else matrix)
