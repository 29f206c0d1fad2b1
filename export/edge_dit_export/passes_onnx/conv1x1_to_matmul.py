"""1x1 convolutions of one image -> matrix products.

    Conv(x, W, b)  -> Reshape(MatMul(Reshape(W), Reshape(x)) + Reshape(b))
    x [1, C, H, W], W [O, C, 1, 1]       W [O, C], x [C, H W], b [O, 1]

The weights in onnxruntime-training's graphs are inputs. Its release 1.19.2 convolves slowly with
such weights, and its ConvGrad is slower still. In SANA-0.6B, whose blocks have two 1x1 convolutions
and a depthwise one, Conv and ConvGrad took half of the time in kernels.
"""

from __future__ import annotations

import onnx_ir as ir

from edge_dit_export.passes_onnx._graph import constant, sides


def conv1x1_to_matmul(model: ir.Model) -> int:
    """Rewrite every 1x1 convolution of one group, stride 1 and one image, in place.

    Args:
        model: a convolution of an unknown shape stays: infer shapes first.

    Returns:
        Number of nodes rewritten.
    """
    convolutions = [node for node in model.graph if _is_product(node)]
    for node in convolutions:
        tape = ir.tape.Tape()
        result = _product(tape, model.graph, node)
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], tape.nodes, node.outputs, [result]
        )
    return len(convolutions)


def _product(tape: ir.tape.Tape, graph: ir.Graph, node: ir.Node) -> ir.Value:
    """Record the product for a convolution on ``tape``; its result [1, O, H, W]."""
    x, weight, *bias = node.inputs
    _, channels, rows, columns = sides(x)
    outputs, y = sides(weight)[0], node.outputs[0].name

    def reshaped(value: ir.Value | None, shape: list[int], name: str) -> ir.Value:
        return tape.op("Reshape", [value, constant(graph, shape)], output=ir.val(f"{y}.{name}"))

    flat = reshaped(x, [channels, rows * columns], "flat")
    matrix = reshaped(weight, [outputs, channels], "matrix")
    result = tape.op("MatMul", [matrix, flat], output=ir.val(f"{y}.product"))
    if bias:
        column = reshaped(bias[0], [outputs, 1], "column")
        result = tape.op("Add", [result, column], output=ir.val(f"{y}.sum"))
    return reshaped(result, [1, outputs, rows, columns], "image")


def _is_product(node: ir.Node) -> bool:
    if node.op_type != "Conv":
        return False
    x, weight = (sides(value) for value in node.inputs[:2])
    allowed = {"pads": {0}, "strides": {1}, "dilations": {1}}
    plain = all(
        set(node.attributes.get_ints(name, ())) <= numbers for name, numbers in allowed.items()
    )
    group = node.attributes.get_int("group", 1)
    return plain and group == 1 and len(x) == 4 and x[0] == 1 and weight[2:] == (1, 1)
