"""What rewrites of ONNX graphs share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    if known is None or known.is_graph_input() or known.shape is None:
        return stored
    return reshaped_late(stored, zero_after([known], before), before)


def zero_after(known: Iterable[ir.Value], before: ir.Node) -> ir.Value:
    """Zero, int64 [1], that is computed only after values of known shapes are.

    Args:
        known: at least one.
        before: the node before which new nodes go.
    """
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    tape = ir.tape.Tape()
    flags = []
    for value in known:
        rank = len(sides(value))
        zeros, ones, axes = (constant(graph, n) for n in ([0] * rank, [1] * rank, range(rank)))
        first = tape.op("Slice", [value, zeros, ones, axes])
        flat = tape.op("Reshape", [first, constant(graph, [1])])
        # By way of bool: what is not a number has no value as an integer.
        flags.append(tape.op("Cast", [flat], {"to": ir.DataType.BOOL}))
    flag = flags[0] if len(flags) == 1 else tape.op("Concat", flags, {"axis": 0})
    never = tape.op("And", [flag, constant(graph, np.zeros(1, bool))])
    if len(flags) > 1:
        never = tape.op("Slice", [never, constant(graph, [0]), constant(graph, [1])])
    zero = tape.op("Cast", [never], {"to": ir.DataType.INT64})
    graph.insert_before(before, tape.nodes)
    return zero


def reshaped_late(stored: ir.Value, zero: ir.Value, before: ir.Node) -> ir.Value:
    """``stored`` in a Reshape to its own shape plus ``zero``."""
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    tape = ir.tape.Tape()
    shape = tape.op("Add", [constant(graph, list(sides(stored))), zero])
    late = tape.op("Reshape", [stored, shape])
    graph.insert_before(before, tape.nodes)
    late.shape, late.type = stored.shape, stored.type
    return late
