"""The ConvGrad of a depthwise convolution -> Conv.

    ConvGrad(dy, x, W) -> dx
    Conv(dy, turned W) -> dx        W turned by 180 degrees, padding k - 1 - p

Where only the gradient of the input is asked for; W is turned in the graph, a few bytes.
onnxruntime's ConvGrad writes every patch out.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edge_dit_export.passes_onnx._graph import shapes_of

TURN = {"starts": [-1, -1], "ends": [-(2**31), -(2**31)], "axes": [2, 3], "steps": [-1, -1]}
"""The Slice that turns a kernel: backwards from the last row and column to the first."""


def depthwise_grad_to_conv(model: onnx.ModelProto) -> int:
    """Rewrite every such ConvGrad of a training_model.onnx, in place.

    Returns:
        Number of nodes rewritten.
    """
    graph = model.graph
    shapes = shapes_of(model)
    nodes, count = [], 0
    for node in graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if not _is_depthwise(node, attributes, shapes):
            nodes.append(node)
            continue
        dy, _, weight = node.input
        turned = f"{weight}.turned"
        kernel = shapes[weight][2:]
        padding = attributes.get("pads", [0, 0, 0, 0])
        sides = [k - 1 - p for k, p in zip([*kernel, *kernel], padding, strict=True)]
        settings = {"group": attributes["group"], "kernel_shape": kernel, "pads": sides}
        nodes += [
            helper.make_node("Slice", [weight, *(f"turn.{n}" for n in TURN)], [turned], turned),
            helper.make_node("Conv", [dy, turned], node.output[:1], node.name, **settings),
        ]
        count += 1
    if count:
        graph.initializer.extend(
            numpy_helper.from_array(np.array(v, np.int64), f"turn.{n}") for n, v in TURN.items()
        )
    del graph.node[:]
    graph.node.extend(nodes)
    return count


def _is_depthwise(
    node: onnx.NodeProto, attributes: dict[str, object], shapes: dict[str, list[int]]
) -> bool:
    if node.op_type != "ConvGrad" or any(node.output[1:]):
        return False
    shape = shapes.get(node.input[2], [])
    plain = all(set(attributes.get(n, [1])) == {1} for n in ("strides", "dilations"))  # type: ignore[call-overload]
    return plain and len(shape) == 4 and shape[:2] == [attributes.get("group"), 1]
