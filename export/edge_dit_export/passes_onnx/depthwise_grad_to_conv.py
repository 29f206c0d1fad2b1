"""The ConvGrad of a depthwise convolution -> Conv.

    ConvGrad(dy, x, W) -> dx
    Conv(dy, turned W) -> dx        W turned by 180 degrees, padding k - 1 - p

This is done where only the gradient of the input is needed. W has a few bytes, and is turned in the
graph. ConvGrad of onnxruntime-training 1.19.2 is slow, because it copies every patch of its input.
"""

from __future__ import annotations

import onnx_ir as ir

from edge_dit_export.passes_onnx._graph import constant, sides

FIRST = -(2**31)
"""End of a backward Slice that includes the first element."""


def depthwise_grad_to_conv(model: ir.Model) -> int:
    """Rewrite every such ConvGrad of a training_model.onnx, in place.

    Args:
        model: the shapes of its convolutions' weights are known.

    Returns:
        Number of nodes rewritten.
    """
    graph, count = model.graph, 0
    for node in graph:
        padding = _padding(node) if _is_depthwise(node) else []
        if not padding or min(padding) < 0:
            continue
        dy, _, weight = node.inputs
        dx = node.outputs[0]
        settings = {
            "group": node.attributes["group"].as_int(),
            "kernel_shape": sides(weight)[2:],
            "pads": padding,
        }
        bounds = [constant(graph, b) for b in ([-1, -1], [FIRST, FIRST], [2, 3], [-1, -1])]
        tape = ir.tape.Tape()
        turned = tape.op("Slice", [weight, *bounds], output=ir.val(f"{dx.name}.turned"))
        conv = tape.op("Conv", [dy, turned], settings, name=node.name)
        ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, [dx], [conv])
        count += 1
    return count


def _is_depthwise(node: ir.Node) -> bool:
    if node.op_type != "ConvGrad" or any(value.name for value in node.outputs[1:]):
        return False
    shape = sides(node.inputs[2])
    plain = all(set(node.attributes.get_ints(n, [1])) == {1} for n in ("strides", "dilations"))
    return plain and len(shape) == 4 and shape[:2] == (node.attributes.get_int("group"), 1)


def _padding(node: ir.Node) -> list[int]:
    """Padding k - 1 - p at both ends of both axes, for a kernel of side k padded by p."""
    kernel = sides(node.inputs[2])[2:]
    before = node.attributes.get_ints("pads", [0, 0, 0, 0])
    return [k - 1 - p for k, p in zip([*kernel, *kernel], before, strict=True)]
