"""Merge chains of views and permutes into one, or none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from edge_dit_export.passes._graph import calls, insert, replace, shape

aten: Any = torch.ops.aten
SHAPE_OPS = (
    aten.view.default,
    aten.permute.default,
    aten.expand.default,
    aten.alias.default,
    aten.unsqueeze.default,
    aten.squeeze.dims,
)
"""Operations that change only how the elements of a tensor are addressed."""


def merge_shape_ops(module: fx.GraphModule) -> int:
    """Replace a chain of shape operations by one that does the same: nothing, a view or a permute.

    Tracing through autograd leaves hundreds of W -> permute -> permute,
    x -> [1, n, d] -> [n, d] -> [1, n, d] and expands that do nothing. A runtime pays for each of
    them, and they hide frozen weights from other passes. A chain is applied to strides alone: the
    final strides of a row-major tensor determine the whole mapping. Clones stay, because in torch a
    later view needs them.

    Returns:
        Number of operations replaced or removed.
    """
    count = 0
    for node in calls(module, *SHAPE_OPS):
        chain = _chain(node)
        for start in range(len(chain)):  # the longest tail of the chain first
            replacement = _shortest(chain[start:])
            if replacement is not None:
                replace(node, replacement)
                count += 1
                break
    module.graph.eliminate_dead_code()
    return count


def _chain(node: fx.Node) -> list[fx.Node]:
    """The shape operations that lead to ``node``, itself last."""
    chain = [node]
    while (source := chain[0].args[0]).target in SHAPE_OPS:  # type: ignore[union-attr]
        chain.insert(0, source)  # type: ignore[arg-type]
    return chain


def _shortest(chain: list[fx.Node]) -> fx.Node | None:
    """What replaces the whole chain: its source, one operation, or None if it needs more."""
    source: fx.Node = chain[0].args[0]  # type: ignore[assignment]
    plain = torch.empty(shape(source), device="meta")
    strided = plain
    try:
        for op in chain:
            strided = op.target(strided, *op.args[1:])  # type: ignore[operator]
    except RuntimeError:  # a view across a permute moves data
        return None
    node = chain[-1]
    if strided.numel() != plain.numel():
        return None
    if strided.is_contiguous():
        if strided.shape == plain.shape:
            return source
        if len(chain) == 1 and node.target is aten.view.default:
            return None
        return _try_insert(node, aten.view.default, source, list(strided.shape))
    order = _permutation(plain, strided)
    if order is None or len(chain) == 1:
        return None
    return insert(node, aten.permute.default, source, order)


def _permutation(plain: Tensor, strided: Tensor) -> list[int] | None:
    """Dimensions of ``plain`` in the order that gives ``strided``, or None."""
    left = list(zip(plain.shape, plain.stride(), strict=True))
    order = []
    for size, stride in zip(strided.shape, strided.stride(), strict=True):
        match = next(
            (i for i, (n, s) in enumerate(left) if n == size and (s == stride or n == 1)), None
        )
        if match is None:
            return None
        order.append(match)
        left[match] = (-1, -1)
    return order if len(order) == plain.dim() else None


def _try_insert(node: fx.Node, target: Any, *args: Any) -> fx.Node | None:
    try:
        return insert(node, target, *args)
    except (RuntimeError, ValueError):  # the source's own strides in torch do not allow this view
        return None
