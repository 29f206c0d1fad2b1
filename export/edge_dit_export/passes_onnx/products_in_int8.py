"""Products with frozen matrices -> integer products, in standard operators.

    FrozenProduct(x, W)            y  = x W^T          W [N, K] in int8, scale s [N]
    FrozenProduct(x, W, back=1)    dx = x W

become

    x^, s_x, z = DynamicQuantizeLinear(x)        x s instead of x, where it goes back
    Cast(MatMulInteger(x^, V, z)) * (s_x * s)    V is W^T, or W and ones for s where it goes back

The node comes from `edge_dit.models.int8_products.frozen_product`, which says what it computes.
onnxruntime joins a product's last four nodes to one kernel, MatMulIntegerToFloat; that is why there
are ones. Activations are the left factor: it has no kernel for unsigned values on the right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript.values import Op, Opset

from edge_dit.models.int8_products import frozen_product
from edge_dit_export.passes_onnx._graph import constant, sides

DOMAIN, NAME = "edge_dit", "FrozenProduct"
_SCHEMA = onnx.defs.OpSchema(
    NAME,
    DOMAIN,
    1,
    inputs=[onnx.defs.OpSchema.FormalParameter(name, "tensor(float)") for name in ("x", "weight")],
    outputs=[onnx.defs.OpSchema.FormalParameter("y", "tensor(float)")],
    attributes=[onnx.defs.OpSchema.Attribute("back", onnx.defs.OpSchema.AttrType.INT)],
)
_frozen_product = Op(Opset(DOMAIN, 1), NAME, _SCHEMA)


def _translate(x: Any, weight: Any, back: bool) -> Any:
    return _frozen_product(x, weight, back=int(back))


TRANSLATIONS = {frozen_product._opoverload: _translate}
"""What the ONNX exporter writes for the op."""


def is_frozen_product(node: ir.Node) -> bool:
    """Whether a node is what `products_in_int8` rewrites."""
    return (node.domain, node.op_type) == (DOMAIN, NAME)


def product_in_int8(node: ir.Node, values: ir.Value, scale: ir.Value) -> None:
    """Replace a frozen product by integer operators, in place.

    Args:
        node: the product.
        values: of the weight, int8 [N, K].
        scale: of the weight's output channels, float32 [N].
    """
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    back = node.attributes["back"].as_int()
    x = node.inputs[0]
    tape = ir.tape.Tape()
    if back:
        x = tape.op("Mul", [x, scale])
        right, other = values, constant(graph, np.ones(sides(values)[1], np.float32))
    else:
        right, other = tape.op("Transpose", [values], {"perm": [1, 0]}), scale
    levels, own, zero = tape.op_multi_out("DynamicQuantizeLinear", [x], num_outputs=3)
    sums = tape.op("MatMulInteger", [levels, right, zero])
    scales = tape.op("Mul", [own, other])
    y = tape.op("Mul", [tape.op("Cast", [sums], {"to": ir.DataType.FLOAT}), scales])
    y.shape, y.type = node.outputs[0].shape, node.outputs[0].type
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [y])


def share_quantised(model: ir.Model) -> None:
    """Quantise an activation once for all products that read it, in place; the exporter's own
    operator is no longer known to the model.
    """
    first: dict[ir.Value | None, ir.Node] = {}
    for node in list(model.graph):
        if node.op_type == "DynamicQuantizeLinear":
            shared = first.setdefault(node.inputs[0], node)
            if shared is not node:
                ir.convenience.replace_nodes_and_values(
                    model.graph, node, [node], [], node.outputs, shared.outputs
                )
    model.opset_imports.pop(DOMAIN, None)
