"""Remove the guard that attention's math form puts around a softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from edge_dit_export.passes._graph import calls, frozen, insert, replace, shape

aten: Any = torch.ops.aten


def safe_softmax_to_softmax(module: fx.GraphModule) -> int:
    """where(all of a row is -inf, 0, softmax(row)) -> softmax(row), if no row can be all -inf.

    torch 2.13 decomposes attention's _safe_softmax into this guard. Inputs of a train step are
    finite: masks are 0 or -10000, never -inf (`edge_dit.models.families`). A score can then be -inf
    only through an infinite constant upstream. Where there is one, the guard stays. Its zeros
    become a single one: an ONNX file would hold them as a constant as large as the scores.

    Returns:
        Number of guards removed.
    """
    count = 0
    for node in calls(module, aten.where.self):
        condition, zero, probabilities = node.args
        scores = _guarded(condition)
        if (
            scores is None
            or probabilities.target != aten._softmax.default
            or probabilities.args[0] is not scores
            or zero.target not in (aten.full_like.default, aten.full.default)
        ):
            continue
        if not _has_infinite_constant(module, scores):
            replace(node, probabilities)
            count += 1
        elif zero.target == aten.full_like.default:
            one = insert(node, aten.full.default, [1] * len(shape(node)), zero.args[1])
            node.args = (condition, one, probabilities)
    module.graph.eliminate_dead_code()
    return count


def _guarded(condition: fx.Node) -> fx.Node | None:
    """The scores x in not(any(not(x == -inf))), or None for any other node."""
    node = condition
    for target in (aten.logical_not.default, aten.any.dim, aten.logical_not.default):
        if node.target != target:
            return None
        node = node.args[0]  # type: ignore[assignment]
    is_guard = node.target == aten.eq.Scalar and node.args[1] == -math.inf
    return node.args[0] if is_guard else None  # type: ignore[return-value]


def _has_infinite_constant(module: fx.GraphModule, node: fx.Node) -> bool:
    seen, open_nodes = {node}, [node]
    while open_nodes:
        current = open_nodes.pop()
        buffer = frozen(module, current)
        if buffer is not None and not torch.isfinite(buffer).all():
            return True
        if any(isinstance(arg, float) and math.isinf(arg) for arg in current.args):
            return True
        new = [n for n in current.all_input_nodes if n not in seen]
        seen.update(new)
        open_nodes += new
    return False
