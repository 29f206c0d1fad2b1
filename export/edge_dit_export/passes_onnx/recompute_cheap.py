"""Values that cost little are computed again in the backward pass, not kept from the forward one.

Between the passes of SANA-0.6B's fused step lie 42 MB a block. A third of it are values such as
sigmoids, which follow by elementwise operations from others that must be kept anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import numpy as np
import onnx_ir as ir

from edge_dit_export.passes_onnx._graph import reshaped_late, sides, zero_after

CHEAP = {
    *("Abs", "Add", "Cast", "Clip", "Div", "Erf", "Exp", "Mul", "Neg", "Pow", "Reciprocal", "Relu"),
    *("Sigmoid", "Sqrt", "Sub", "Tanh", "Pad", "Reshape", "Transpose", "Split", "Slice", "Concat"),
    *("Greater", "LayerNormalization", "Softmax"),
}
"""Operations that are done twice rather than their result kept."""
VIEWS = ("Reshape",)
"""Operations whose result needs no memory of its own."""
LEAST = 2**19
"""Bytes of a value from which on this is worth it."""
LONGEST = 4
"""Most operations that are done twice for one value."""


def recompute_cheap(model: ir.Model, loss: str, target: str) -> int:
    """Compute again what the backward pass reads and what is cheap, in place.

    What is computed again waits for the operation before the one that reads it, so that no runtime
    does it earlier. The same holds for what only depends on the forward pass.

    Args:
        model: of a whole step, nodes in the order they should run.
        loss: name of the output where the forward pass ends.
        target: name of an input that all gradients depend on, and no kept value.

    Returns:
        Number of values that are no longer kept.
    """
    nodes = list(model.graph)
    place = {node: number for number, node in enumerate(nodes)}
    end = next(place[v.producer()] for v in model.graph.outputs if v.name == loss)  # type: ignore[index]
    backward = nodes[end + 1 :]
    kept = [v for node in nodes[: end + 1] for v in node.outputs if _late(v, place, end)]
    again, anchors = _divided(kept)
    results = [node for node in backward if node.outputs[0].is_graph_output()]
    early = _without(nodes, target)
    copies: dict[ir.Value, ir.Value] = {}
    latest = None
    for node in backward:
        wanted = again | anchors if node in early else again
        read = [v for v in node.inputs if v in wanted and not _is_small(v)]  # type: ignore[arg-type]
        if read and latest is not None:
            # Gradients that are results too: runtimes would leave them and what they read to the
            # end.
            due = [other for other in results if place[other] < place[node]]
            results = results[len(due) :]
            again_here = _Again(anchors, copies, [*due, latest], node)
            for index, value in enumerate(node.inputs):
                if value in read:
                    node.replace_input_with(index, again_here.of(value))
        if _known(node):
            latest = node
    return len(copies)


def _without(nodes: Iterable[ir.Node], target: str) -> set[ir.Node]:
    """Those of ``nodes``, in order, that do not depend on an input."""
    with_it: set[ir.Value | None] = set()
    without: set[ir.Node] = set()
    for node in nodes:
        if any(value in with_it or (value and value.name == target) for value in node.inputs):
            with_it.update(node.outputs)
        else:
            without.add(node)
    return without


def _late(value: ir.Value, place: dict[ir.Node, int], end: int) -> bool:
    return any(place.get(node, -1) > end for node, _ in value.uses())


def _known(node: ir.Node) -> bool:
    """Whether others can wait for a node's result."""
    result = node.outputs[0]
    return bool(sides(result)) and result.dtype == ir.DataType.FLOAT


def _divided(kept: Iterable[ir.Value]) -> tuple[set[ir.Value], set[ir.Value]]:
    """Those of ``kept``, in order, that follow from others by few operations; and these others."""
    again: set[ir.Value] = set()
    anchors: set[ir.Value] = set()

    def steps(value: ir.Value, most: int) -> int:
        """Operations that lead to a value from what is there; more than `LONGEST` if too many."""
        node = value.producer()
        if node is None or value in anchors or _is_small(value):
            return 0
        own = int(node.op_type not in VIEWS)
        if not _is_cheap(node) or own > most:
            return LONGEST + 1
        return own + sum(steps(v, most - own) for v in node.inputs if v is not None)

    for value in kept:
        if _is_small(value) or steps(value, LONGEST) > LONGEST:
            anchors.add(value)
        else:
            again.add(value)
    return again, anchors


def _is_cheap(node: ir.Node) -> bool:
    """Elementwise, or the scores of attention: a product of many small matrices."""
    scores = node.op_type == "MatMul" and len(sides(node.inputs[0])) > 2
    return node.op_type in CHEAP or scores


def _is_small(value: ir.Value) -> bool:
    return bool(sides(value)) and 4 * int(np.prod(sides(value))) < LEAST


class _Again:
    """Computes values again.

    Args:
        anchors: what is kept.
        copies: what was computed again so far; more is added.
        after: what must be computed first.
        place: the node before which new nodes go.
    """

    def __init__(
        self,
        anchors: set[ir.Value],
        copies: dict[ir.Value, ir.Value],
        after: list[ir.Node],
        place: ir.Node,
    ) -> None:
        self.anchors, self.copies, self.after, self.place = anchors, copies, after, place

    @cached_property
    def zero(self) -> ir.Value:
        """Zero that is known only when these values should be computed."""
        return zero_after([node.outputs[0] for node in dict.fromkeys(self.after)], self.place)

    def of(self, value: ir.Value) -> ir.Value:
        """A copy of a value; the value itself where it is there anyway."""
        node = value.producer()
        if node is None or _is_small(value):
            return value
        if value not in self.copies:
            if value in self.anchors:
                self.copies[value] = reshaped_late(value, self.zero, self.place)
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
