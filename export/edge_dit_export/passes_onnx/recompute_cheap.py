"""Values that cost little are computed again in the backward pass, not kept from the forward one.

Between the passes of SANA-0.6B's fused step lie 42 MB a block. A third of it are values such as
sigmoids, which follow by elementwise operations from others that must be kept anyway.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from edge_dit_export.passes_onnx._graph import shaped_after, sides

CHEAP = {
    *("Abs", "Add", "Cast", "Clip", "Div", "Erf", "Exp", "Mul", "Neg", "Pow", "Reciprocal", "Relu"),
    *("Sigmoid", "Sqrt", "Sub", "Tanh", "Pad", "Reshape", "Transpose", "Split", "Slice", "Concat"),
    *("LayerNormalization",),
}
"""Operations that are done twice rather than their result kept."""
VIEWS = ("Reshape",)
"""Operations whose result needs no memory of its own."""
LEAST = 2**19
"""Bytes of a value from which on this is worth it."""
LONGEST = 4
"""Most operations that are done twice for one value."""


def recompute_cheap(model: ir.Model, loss: str) -> int:
    """Compute again what the backward pass reads and what is cheap, in place.

    What is computed again waits for the operation before the one that reads it, so that no runtime
    does it earlier.

    Args:
        model: of a whole step, nodes in the order they should run.
        loss: name of the output where the forward pass ends.

    Returns:
        Number of values that are no longer kept.
    """
    graph = model.graph
    nodes = list(graph)
    place = {node: number for number, node in enumerate(nodes)}
    end = next(place[v.producer()] for v in graph.outputs if v.name == loss)  # type: ignore[index]
    kept = [v for node in nodes[: end + 1] for v in node.outputs if _late(v, place, end)]
    again, anchors = _divided(kept)
    copies: dict[ir.Value, ir.Value] = {}
    for value in sorted(again, key=lambda value: place[_first_late(value, place, end)]):
        first = _first_late(value, place, end)
        before = next(
            (node.outputs[0] for node in reversed(nodes[end + 1 : place[first]]) if _known(node)),
            None,
        )
        if before is not None:
            users = [(n, i) for n, i in value.uses() if place.get(n, -1) > end]
            copy = _Again(anchors, copies, before, first).of(value)
            for node, index in users:
                node.replace_input_with(index, copy)
    return len(copies)


def _late(value: ir.Value, place: dict[ir.Node, int], end: int) -> bool:
    return any(place.get(node, -1) > end for node, _ in value.uses())


def _first_late(value: ir.Value, place: dict[ir.Node, int], end: int) -> ir.Node:
    """The first node after ``end`` that reads a value."""
    late = [node for node, _ in value.uses() if place.get(node, -1) > end]
    return min(late, key=lambda node: place[node])


def _known(node: ir.Node) -> bool:
    """Whether others can wait for a node's result."""
    result = node.outputs[0]
    return bool(sides(result)) and result.dtype == ir.DataType.FLOAT


def _divided(kept: Iterable[ir.Value]) -> tuple[list[ir.Value], set[ir.Value]]:
    """Those of ``kept``, in order, that follow from others by few operations; and these others."""
    again: list[ir.Value] = []
    anchors: set[ir.Value] = set()

    def steps(value: ir.Value, most: int) -> int:
        """Operations that lead to a value from what is there; more than `LONGEST` if too many."""
        node = value.producer()
        if node is None or value in anchors or _is_small(value):
            return 0
        own = int(node.op_type not in VIEWS)
        if node.op_type not in CHEAP or own > most:
            return LONGEST + 1
        return own + sum(steps(v, most - own) for v in node.inputs if v is not None)

    for value in kept:
        if _is_small(value) or steps(value, LONGEST) > LONGEST:
            anchors.add(value)
        else:
            again.append(value)
    return again, anchors


def _is_small(value: ir.Value) -> bool:
    return bool(sides(value)) and 4 * int(np.prod(sides(value))) < LEAST


class _Again:
    """Computes values again.

    Args:
        anchors: what is kept.
        copies: what was computed again so far; more is added.
        before: what must be computed first.
        place: the node before which new nodes go.
    """

    def __init__(
        self,
        anchors: set[ir.Value],
        copies: dict[ir.Value, ir.Value],
        before: ir.Value,
        place: ir.Node,
    ) -> None:
        self.anchors, self.copies, self.before, self.place = anchors, copies, before, place

    def of(self, value: ir.Value) -> ir.Value:
        """A copy of a value; the value itself where it is there anyway."""
        node = value.producer()
        if node is None or _is_small(value):
            return value
        if value not in self.copies:
            if value in self.anchors:
                self.copies[value] = shaped_after(self.before, value, self.place)
            else:
                self._repeat(node)
        return self.copies[value]

    def _repeat(self, node: ir.Node) -> None:
        inputs = [v if v is None else self.of(v) for v in node.inputs]
        attributes = list(node.attributes.values())
        copy = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs))
        node.graph.insert_before(self.place, copy)  # type: ignore[union-attr]
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.shape, new.type = old.shape, old.type
            self.copies[old] = new
