"""Give a graph its weights in fewer bytes; it widens them to float32 where they are used.

    MatMul(x, W)  -> MatMul(x, Cast(W))                        W in float16
    MatMul(x, W)  -> MatMul(x, DequantizeLinear(W, scale))     W in int8
    MatMul(x, W)  -> MatMul(x, (nibbles(W) - 8) * scale)       W in int4, two elements in a byte

onnxruntime 1.19.2 runs every DequantizeLinear and Cast of weights before the first product, so that
a whole block would lie in float32. Here each reader widens its own weight, and only once the other
factor is computed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edge_dit.contract.targets import INT4, INT8, PIECE
from edge_dit.models.quantize import MIDDLE, group_of
from edge_dit_export.passes_onnx._graph import constant, shaped_after
from edge_dit_export.passes_onnx.products_in_int8 import is_frozen_product, product_in_int8

FLOAT = ir.TensorType(ir.DataType.FLOAT)
STORED_TYPES = {
    "float16": ir.DataType.FLOAT16,
    INT8: ir.DataType.INT8,
    INT4: ir.DataType.UINT8,
}


def weights_in_fewer_bytes(model: ir.Model, kinds: Mapping[str, str]) -> int:
    """Store inputs in fewer bytes and widen them in the graph, in place.

    Products in int8 (`products_in_int8`) read int8 values as they are. Otherwise float16 goes
    through Cast; int8 through DequantizeLinear with one scale per output channel; int4 as
    `edge_dit.models.quantize.from_int4` has it. Scales become the input "<name>.scale" after all
    others. A product with a large weight is computed in pieces of its output channels, one after
    the other: FLUX.1-dev's largest weight has 189 MB in float32.

    Args:
        model: its inputs of ``kinds`` are float32.
        kinds: name of an input -> "float16", "int8" or "int4".

    Returns:
        Number of inputs rewritten.
    """
    graph = model.graph
    beside_products = any(map(is_frozen_product, graph))
    count = 0
    for value in list(graph.inputs):
        kind = kinds.get(str(value.name))
        if kind is None:
            continue
        count += 1
        weight = _Weight(graph, value, kind, beside_products)
        for number, (reader, place) in enumerate(list(value.uses())):
            if _reads_int8(reader, weight):
                continue
            pieces = -(-4 * math.prod(weight.sides) // PIECE)
            if pieces > 1 and _is_product(reader):
                _product_in_pieces(weight, reader, place, min(pieces, weight.outputs), number)
            else:
                known = _other_factor(reader, value)
                wide = weight.widen(reader, known, f"{value.name}.wide.{number}")
                reader.replace_input_with(place, wide)
    return count


def _reads_int8(reader: ir.Node, weight: _Weight) -> bool:
    """Rewrite a product in int8 that reads the weight, perhaps reshaped; False if it is none."""
    if is_frozen_product(reader):
        product_in_int8(reader, weight.value, weight.scale)
        return True
    products = [node for node, _ in reader.outputs[0].uses()]
    if reader.op_type != "Reshape" or not products or not all(map(is_frozen_product, products)):
        return False
    reader.outputs[0].dtype = ir.DataType.INT8
    for product in products:
        product_in_int8(product, reader.outputs[0], weight.scale)
    return True


class _Weight:
    """A weight input that is stored in fewer bytes, in a graph with products in int8 or without."""

    def __init__(self, graph: ir.Graph, value: ir.Value, dtype: str, beside_products: bool) -> None:
        assert value.shape is not None
        self.graph, self.value, self.kind = graph, value, dtype
        self.sides = [int(side) for side in value.shape.numpy()]
        self.outputs, scales = self.sides[0], [self.sides[0]]
        value.dtype = STORED_TYPES[dtype]
        if dtype == INT4:
            inputs = math.prod(self.sides[1:])
            value.shape = ir.Shape([self.outputs, inputs // 2])
            scales.append(inputs // group_of(inputs))
        self.scale = ir.Value(name=f"{value.name}.scale", shape=ir.Shape(scales), type=FLOAT)
        if dtype in (INT8, INT4):
            graph.inputs.append(self.scale)
        # In a graph with a DequantizeLinear onnxruntime 1.19.2 keeps a turned copy of every int8
        # weight that a Transpose reads, whatever is switched off.
        self.beside_products = beside_products

    def widen(
        self,
        before: ir.Node,
        known: ir.Value | None,
        name: str,
        part: tuple[int, int] | None = None,
    ) -> ir.Value:
        """The weight in float32: all of it, or output channels [start, end).

        Args:
            before: the node before which new nodes are inserted.
            known: what must be computed first.
            name: of the result.
            part: start and end.
        """
        start, end = part or (0, self.outputs)
        stored, scale = self.value, self.scale
        if part is not None:
            stored = _slice(stored, 0, part, before)
        wide = ir.Value(name=name, shape=ir.Shape([end - start, *self.sides[1:]]), type=FLOAT)
        if self.kind == INT4:
            scale = scale if part is None else _slice(scale, 0, part, before)
            self._unpack(shaped_after(known, stored, before), scale, wide, before)
            return wide
        if self.kind != INT8:
            stored = shaped_after(known, stored, before)
            to = ir.AttrInt64("to", ir.DataType.FLOAT.value)
            self.graph.insert_before(before, ir.Node("", "Cast", [stored], [to], outputs=[wide]))
            return wide
        if part is not None:
            scale = _slice(scale, 0, part, before)
        if self.beside_products:
            node = ir.Node("", "Cast", [stored], [ir.AttrInt64("to", ir.DataType.FLOAT.value)])
            column = ir.Node(
                "", "Reshape", [scale, constant(self.graph, [-1, *[1] * (len(self.sides) - 1)])]
            )
            scaled = ir.Node("", "Mul", [node.outputs[0], column.outputs[0]], outputs=[wide])
            for new in (node, column, scaled):
                self.graph.insert_before(before, new)
            return wide
        late = _after(known, scale, before)
        axis = ir.AttrInt64("axis", 0)
        node = ir.Node("", "DequantizeLinear", [stored, late], [axis], outputs=[wide])
        self.graph.insert_before(before, node)
        return wide

    def _unpack(self, stored: ir.Value, scale: ir.Value, wide: ir.Value, before: ir.Node) -> None:
        """Let ``wide`` be rows in four bits times their scales."""
        assert wide.shape is not None
        graph, rows = self.graph, int(wide.shape.numpy()[0])
        inputs = math.prod(self.sides[1:])
        group = group_of(inputs)

        def byte(value: int) -> ir.Value:
            return constant(graph, np.array(value, np.uint8))

        # Of one byte an element until DequantizeLinear, which widens groups as rows.
        low = ir.Node("", "Mod", [stored, byte(16)])
        right = ir.AttrString("direction", "RIGHT")
        high = ir.Node("", "BitShift", [stored, byte(4)], [right])
        halves = [low.outputs[0], high.outputs[0]]
        both = ir.Node("", "Concat", halves, [ir.AttrInt64("axis", 1)])
        groups = rows * inputs // group
        grouped = ir.Node("", "Reshape", [both.outputs[0], constant(graph, [groups, group])])
        scales = ir.Node("", "Reshape", [scale, constant(graph, [groups])])
        middles = ir.Node("", "Expand", [byte(MIDDLE), constant(graph, [groups])])
        factors = [node.outputs[0] for node in (grouped, scales, middles)]
        floats = ir.Node("", "DequantizeLinear", factors, [ir.AttrInt64("axis", 0)])
        sides = constant(graph, [rows, *self.sides[1:]])
        last = ir.Node("", "Reshape", [floats.outputs[0], sides], outputs=[wide])
        for node in (low, high, both, grouped, scales, middles, floats, last):
            graph.insert_before(before, node)


def _is_product(reader: ir.Node) -> bool:
    """Whether a node is a plain product of two matrices, and perhaps an addend."""
    shapes = [value.shape for value in reader.inputs[:2] if value is not None]
    flat = all(shape is not None and len(shape) == 2 for shape in shapes)
    factors = [a.as_float() for n, a in reader.attributes.items() if n in ("alpha", "beta")]
    return reader.op_type in ("MatMul", "Gemm") and flat and set(factors) <= {1.0}


def _product_in_pieces(
    weight: _Weight, product: ir.Node, place: int, pieces: int, number: int
) -> None:
    """Replace a product with a weight W [N, K], its factor at ``place`` (here the right one):

        x W^T + b  -> Concat(x W_1^T + b_1, x W_2^T + b_2, ...)     N is a side of the result
        y W + b    -> ((b + y_1 W_1) + y_2 W_2) + ...               N is summed over

    Every W_i is widened only once the product before it is computed.
    """
    graph, attributes = weight.graph, product.attributes
    flags = [attributes[n].as_int() if n in attributes else 0 for n in ("transA", "transB")]
    other, addend = product.inputs[1 - place], (*product.inputs, None)[2]
    assert other is not None
    known = _other_factor(product, weight.value)
    summed = flags[place] != place
    bounds = np.linspace(0, weight.outputs, pieces + 1).astype(int).tolist()
    results: list[ir.Value] = []
    for piece, part in enumerate(itertools.pairwise(bounds)):
        wide = weight.widen(product, known, f"{weight.value.name}.wide.{number}.{piece}", part)
        factor, more = other, addend
        if summed:
            axis = place if not flags[1 - place] else 1 - place
            factor = _slice(other, axis, part, product)
            more = results[-1] if results else addend
        elif addend is not None:
            more = _part_of_addend(addend, place, weight.outputs, part, product)
        factors = [wide, factor] if place == 0 else [factor, wide]
        gemm = ir.Node("", "Gemm", [*factors, more], list(attributes.values()))
        graph.insert_before(product, gemm)
        known = gemm.outputs[0]
        known.shape, known.type = ir.Shape(_sides(product, part, None if summed else place)), FLOAT
        results.append(known)
    final = results[-1]
    if not summed:
        joined = ir.Node("", "Concat", results, [ir.AttrInt64("axis", place)])
        graph.insert_before(product, joined)
        final = joined.outputs[0]
    ir.convenience.replace_nodes_and_values(graph, product, [product], [], product.outputs, [final])


def _sides(product: ir.Node, part: tuple[int, int], axis: int | None) -> list[int]:
    """Shape of a product, ``part`` of it along ``axis`` if there is one."""
    shape = product.outputs[0].shape
    assert shape is not None
    return [part[1] - part[0] if n == axis else int(s) for n, s in enumerate(shape.numpy())]


def _part_of_addend(
    addend: ir.Value, axis: int, outputs: int, part: tuple[int, int], before: ir.Node
) -> ir.Value:
    """The addend of a part of a product [M, N]: a slice, or all of it where it is broadcast."""
    assert addend.shape is not None
    own = axis - 2 + len(addend.shape)
    if own < 0 or addend.shape[own] != outputs:
        return addend
    return _slice(addend, own, part, before)


def _slice(value: ir.Value, axis: int, part: tuple[int, int], before: ir.Node) -> ir.Value:
    """Elements [start, end) of ``value`` along ``axis``."""
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    assert value.shape is not None
    bounds = [constant(graph, [n]) for n in (*part, axis)]
    node = ir.Node("", "Slice", [value, *bounds])
    graph.insert_before(before, node)
    sides = list(value.shape)
    sides[axis] = part[1] - part[0]
    node.outputs[0].shape, node.outputs[0].type = ir.Shape(sides), value.type
    return node.outputs[0]


def _other_factor(reader: ir.Node, weight: ir.Value) -> ir.Value | None:
    """What a weight is multiplied with, also after reshapes of the weight."""
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
    """``scale`` plus zero times an element of ``known``, so that it is computed after that."""
    if known is None or known.is_graph_input() or known.shape is None:
        return scale
    graph, rank = before.graph, len(known.shape)
    assert isinstance(graph, ir.Graph)
    zeros, ones = (constant(graph, [n] * rank) for n in (0, 1))
    axes = constant(graph, range(rank))
    first = ir.Node("", "Slice", [known, zeros, ones, axes])
    flat = ir.Node("", "Reshape", [first.outputs[0], constant(graph, [1])])
    none = constant(graph, np.zeros(1, np.float32))
    zero = ir.Node("", "Mul", [flat.outputs[0], none])
    late = ir.Node("", "Add", [scale, zero.outputs[0]])
    for node in (first, flat, zero, late):
        graph.insert_before(before, node)
    late.outputs[0].shape, late.outputs[0].type = scale.shape, FLOAT
    return late.outputs[0]
