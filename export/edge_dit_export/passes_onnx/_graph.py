"""What rewrites of ONNX graphs share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


def sides(value: ir.Value | None) -> tuple[int, ...]:
    """Shape of ``value``; () where a side of it, or all of it, is unknown."""
    shape = value.shape if value is not None else None
    return shape.numpy() if shape is not None and shape.is_static() else ()


def constant(graph: ir.Graph, values: np.ndarray | Sequence[int]) -> ir.Value:
    """An initialiser, shared by all that ask for the same values; a list becomes int64."""
    array = values if isinstance(values, np.ndarray) else np.array(values, np.int64)
    name = f"constant.{array.dtype}.{array.tolist()}".replace(" ", "")
    if name not in graph.initializers:
        ir.tape.Tape(graph).initializer(ir.tensor(array, name=name))
    return graph.initializers[name]


def shaped_after(known: ir.Value | None, stored: ir.Value, before: ir.Node) -> ir.Value:
    """``stored``, in a Reshape to its own shape whose numbers are known only after ``known`` is;
    onnxruntime copies nothing for it.
    """
    if known is None or known.is_graph_input() or known.shape is None or stored.shape is None:
        return stored
    graph, rank = before.graph, len(known.shape)
    assert isinstance(graph, ir.Graph)
    zeros, ones = (constant(graph, [n] * rank) for n in (0, 1))
    first = ir.Node("", "Slice", [known, zeros, ones, constant(graph, range(rank))])
    flat = ir.Node("", "Reshape", [first.outputs[0], constant(graph, [1])])
    # By way of bool: what is not a number has no value as an integer.
    to = [ir.AttrInt64("to", kind.value) for kind in (ir.DataType.BOOL, ir.DataType.INT64)]
    truth = ir.Node("", "Cast", [flat.outputs[0]], [to[0]])
    never = ir.Node("", "And", [truth.outputs[0], constant(graph, np.zeros(1, bool))])
    zero = ir.Node("", "Cast", [never.outputs[0]], [to[1]])
    shape = ir.Node("", "Add", [constant(graph, stored.shape.numpy()), zero.outputs[0]])
    late = ir.Node("", "Reshape", [stored, shape.outputs[0]])
    for node in (first, flat, truth, never, zero, shape, late):
        graph.insert_before(before, node)
    late.outputs[0].shape, late.outputs[0].type = stored.shape, stored.type
    return late.outputs[0]
