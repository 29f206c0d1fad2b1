"""Products with a frozen matrix as layers that XNNPACK takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edge_dit_export.passes._graph import add_buffer, calls, frozen, insert, replace

aten: Any = torch.ops.aten


def raise_frozen_gemm(module: fx.GraphModule) -> int:
    """Write every matrix product with a frozen factor W [n, k] as a linear layer, or as a product
    whose right factor is the matrix itself, as it is stored:

        mm(x, W^T)           -> linear(x, W)              addmm(b, x, W^T) -> linear(x, W, b)
        mm(dy, W)            -> mm(dy, W)                 addmm(b, dy, W)  -> mm(dy, W) + b
        mm(W, x)             -> linear(x^T, W)^T
        mm(W^T, dy)          -> mm(dy^T, W)^T

    What becomes of both is `edge_dit_export.targets.xnnpack`'s. Behind a permute or a view a weight
    is no constant to it, and ExecuTorch 1.5.1's portable kernels are many times slower; its addmm
    is ~45 times slower than torch's.

    Returns:
        Number of products written anew or found to be as they should.
    """
    count = 0
    for node in calls(module, aten.mm.default, aten.addmm.default):
        *bias, left, right = node.args
        if (found := _weight(module, node, right)) is not None:
            weight, flipped = found
            replace(node, _product(node, left, weight, flipped, bias))
        elif not bias and (found := _weight(module, node, left)) is not None:
            weight, flipped = found
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
    """Of ``x`` with W^T where W is ``flipped``, else with W, and the bias."""
    if flipped:
        return insert(before, aten.linear.default, x, weight, *bias)
    product = insert(before, aten.mm.default, x, weight)
    return insert(before, aten.add.Tensor, product, *bias) if bias else product


def _weight(
    module: fx.GraphModule, before: fx.Node, factor: fx.Node
) -> tuple[fx.Node, bool] | None:
    """A buffer that holds ``factor``, if that is frozen, and whether it holds it transposed."""
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
