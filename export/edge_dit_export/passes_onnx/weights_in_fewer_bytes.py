"""Inputs that are weights in float16 or int8 instead of float32."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

FLOAT = ir.TensorType(ir.DataType.FLOAT)


def weights_in_fewer_bytes(model: ir.Model, names: Iterable[str], dtype: str) -> int:
    """Let inputs come in fewer bytes and widen them in the graph, in place.

    float16 goes through Cast; int8 through DequantizeLinear with one scale per output channel,
    which becomes the input "<name>.scale" behind all others. Each reader widens the weight for
    itself, and int8 only once the other factor is known: a runtime that runs nodes as soon as it
    can would else hold the whole block in float32.

    Args:
        model: its inputs ``names`` are float32.
        names: of the inputs.
        dtype: "float16" or "int8".

    Returns:
        Number of inputs rewritten.
    """
    chosen = set(names)
    graph = model.graph
    count = 0
    for value in list(graph.inputs):
        if value.name not in chosen:
            continue
        count += 1
        uses, shape = list(value.uses()), value.shape
        assert shape is not None
        value.dtype = ir.DataType.INT8 if dtype == "int8" else ir.DataType.FLOAT16
        scale = ir.Value(name=f"{value.name}.scale", shape=ir.Shape([shape[0]]), type=FLOAT)
        if dtype == "int8":
            graph.inputs.append(scale)
        for number, (reader, place) in enumerate(uses):
            wide = ir.Value(name=f"{value.name}.wide.{number}", shape=shape, type=FLOAT)
            if dtype == "int8":
                late = _after(_other_factor(reader, value), scale, reader)
                inputs, attribute = [value, late], ir.AttrInt64("axis", 0)
                node = ir.Node("", "DequantizeLinear", inputs, [attribute], outputs=[wide])
            else:
                to = ir.AttrInt64("to", ir.DataType.FLOAT.value)
                node = ir.Node("", "Cast", [value], [to], outputs=[wide])
            graph.insert_before(reader, node)
            reader.replace_input_with(place, wide)
    return count


def _other_factor(reader: ir.Node, weight: ir.Value) -> ir.Value | None:
    """What a weight is multiplied with, past reshapes of the weight."""
    while True:
        others = [v for v in reader.inputs if v is not None and v is not weight]
        factors = [v for v in others if v.producer() is not None or v.is_graph_input()]
        if factors:
            return factors[0]
        following = [node for node, _ in reader.outputs[0].uses()]
        if len(following) != 1:
            return None
        reader, weight = following[0], reader.outputs[0]


def _after(known: ir.Value | None, scale: ir.Value, before: ir.Node) -> ir.Value:
    """``scale``, available only once ``known`` is: plus zero times its first element."""
    if known is None or known.is_graph_input() or known.shape is None:
        return scale
    graph, rank = before.graph, len(known.shape)
    assert isinstance(graph, ir.Graph)
    zeros, ones = (_constant(graph, np.full(rank, n, np.int64)) for n in (0, 1))
    axes = _constant(graph, np.arange(rank))
    first = ir.Node("", "Slice", [known, zeros, ones, axes])
    flat = ir.Node("", "Reshape", [first.outputs[0], _constant(graph, np.ones(1, np.int64))])
    none = _constant(graph, np.zeros(1, np.float32))
    zero = ir.Node("", "Mul", [flat.outputs[0], none])
    late = ir.Node("", "Add", [scale, zero.outputs[0]])
    for node in (first, flat, zero, late):
        graph.insert_before(before, node)
    late.outputs[0].shape, late.outputs[0].type = scale.shape, FLOAT
    return late.outputs[0]


def _constant(graph: ir.Graph, array: np.ndarray) -> ir.Value:
    """An initialiser, shared by all that ask for the same values."""
    name = f"widen.{array.dtype}.{'.'.join(map(str, array.tolist()))}"
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        kind = ir.TensorType(tensor.dtype)
        shape = ir.Shape(array.shape)
        graph.register_initializer(ir.Value(name=name, shape=shape, type=kind, const_value=tensor))
    return graph.initializers[name]
