"""Integer products -> products in float32: a graph as it would be if nothing were rounded.

    DynamicQuantizeLinear(x)     -> x, scale 1, zero point 0
    MatMulInteger(x^, V, z)      -> MatMul(x, Cast(V))

Two machines that compute in int8 round some values to different levels, so that no more than a
hundredth of a gradient can be compared. Without the rounding they agree as in float32, and verify
compares all the rest of a graph so (`edge_dit.app.rounding`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edge_dit_export.passes_onnx._graph import constant

WHERE = "a product in int8"


def without_rounding(model: ir.Model) -> int:
    """Rewrite every integer product, in place.

    Returns:
        Number of products rewritten.

    Raises:
        ValueError: quantised values are read by something else, or with another zero point, than
            an export writes.
    """
    graph = model.graph
    count = 0
    for node in list(graph):
        if node.op_type == "DynamicQuantizeLinear":
            levels, scale, zero = node.outputs
            for product, place in [*levels.uses(), *zero.uses()]:
                if product.op_type != "MatMulInteger" or _read(product, place) is not node:
                    raise ValueError(f"{product.name or product.op_type} reads {levels.name}")
            one = constant(graph, np.ones((), np.float32))
            for product, _ in list(levels.uses()):
                _in_float(graph, product, node.inputs[0])
                count += 1
            scale.replace_all_uses_with(one)
            graph.remove(node, safe=True)
    left = [node for node in graph if node.op_type == "MatMulInteger"]
    if left:
        raise ValueError(f"{left[0].name or 'MatMulInteger'} has no quantised activation")
    return count


def _read(product: ir.Node, place: int) -> ir.Node | None:
    """The node whose values, and zero point beside them, a product reads as its left factor."""
    inputs = list(product.inputs)
    if place not in (0, 2) or len(inputs) != 3:
        return None
    left, zero = inputs[0], inputs[2]
    node = left.producer() if left else None
    both = node is not None and zero is node.outputs[2] and left is node.outputs[0]
    return node if both else None


def _in_float(graph: ir.Graph, product: ir.Node, x: ir.Value | None) -> None:
    wide = ir.Node("", "Cast", [product.inputs[1]], [ir.AttrInt64("to", ir.DataType.FLOAT.value)])
    matmul = ir.Node("", "MatMul", [x, wide.outputs[0]])
    matmul.outputs[0].shape = product.outputs[0].shape
    matmul.outputs[0].dtype = ir.DataType.FLOAT
    ir.convenience.replace_nodes_and_values(
        graph, product, [product], [wide, matmul], product.outputs, matmul.outputs
    )
