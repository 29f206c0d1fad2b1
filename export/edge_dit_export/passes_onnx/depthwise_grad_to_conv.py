"""The ConvGrad of a depthwise convolution -> Conv.

    ConvGrad(dy, x, W) -> dx
    Conv(dy, turned W) -> dx        W turned by 180 degrees, padding k - 1 - p

Where only the gradient of the input is asked for; W is turned in the graph, a few bytes.
onnxruntime's ConvGrad writes every patch out.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper

from edge_dit_export.passes_onnx._graph import add_int64, replace_nodes, shapes_of

FIRST = -(2**31)
"""A Slice's end that takes it backwards to the first element and includes it."""


def depthwise_grad_to_conv(model: onnx.ModelProto) -> int:
    """Rewrite every such ConvGrad of a training_model.onnx, in place.

    Returns:
        Number of nodes rewritten.
    """
    shapes = shapes_of(model)

    def convolution(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if not _is_depthwise(node, attributes, shapes):
            return None
        dy, _, weight = node.input
        kernel = shapes[weight][2:]
        padding = attributes.get("pads", [0, 0, 0, 0])
        sides = [k - 1 - p for k, p in zip([*kernel, *kernel], padding, strict=True)]
        if min(sides) < 0:
            return None
        settings = {"group": attributes["group"], "kernel_shape": kernel, "pads": sides}
        turned = f"{node.output[0]}.turned"
        bounds = {"starts": [-1, -1], "ends": [FIRST, FIRST], "axes": [2, 3], "steps": [-1, -1]}
        names = [add_int64(model, f"{turned}.{n}", values) for n, values in bounds.items()]
        return [
            helper.make_node("Slice", [weight, *names], [turned], turned),
            helper.make_node("Conv", [dy, turned], node.output[:1], node.name, **settings),
        ]

    return replace_nodes(model, convolution)


def _is_depthwise(
    node: onnx.NodeProto, attributes: dict[str, Any], shapes: dict[str, list[int]]
) -> bool:
    if node.op_type != "ConvGrad" or any(node.output[1:]):
        return False
    shape = shapes.get(node.input[2], [])
    plain = all(set(attributes.get(n, [1])) == {1} for n in ("strides", "dilations"))
    return plain and len(shape) == 4 and shape[:2] == [attributes.get("group"), 1]
