"""1x1 convolutions of one image -> matrix products.

    Conv(x, W, b)  -> Reshape(MatMul(Reshape(W), Reshape(x)) + Reshape(b))
    x [1, C, H, W], W [O, C, 1, 1]       W [O, C], x [C, H W], b [O, 1]

The weights of onnxruntime-training's graphs are inputs, for which its convolution has no fast way,
and its ConvGrad is slower still: with SANA-0.6B's convolutions, two of a block 1x1 and one
depthwise, both took half of the time in kernels.
"""

from __future__ import annotations

import onnx
from onnx import helper

from edge_dit_export.passes_onnx._graph import add_int64, replace_nodes, shapes_of


def conv1x1_to_matmul(model: onnx.ModelProto) -> int:
    """Rewrite every 1x1 convolution of one group, stride 1 and one image, in place.

    Returns:
        Number of nodes rewritten.
    """
    shapes = shapes_of(model)

    def reshaped(value: str, sides: list[int], output: str) -> onnx.NodeProto:
        shape = add_int64(model, f"{output}.shape", sides)
        return helper.make_node("Reshape", [value, shape], [output], output)

    def product(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if not _is_product(node, shapes):
            return None
        x, weight, *bias = node.input
        _, channels, rows, columns = shapes[x]
        outputs, y = shapes[weight][0], node.output[0]
        flat, matrix, result = f"{y}.flat", f"{y}.matrix", f"{y}.product"
        nodes = [
            reshaped(x, [channels, rows * columns], flat),
            reshaped(weight, [outputs, channels], matrix),
            helper.make_node("MatMul", [matrix, flat], [result], result),
        ]
        if bias:
            column, total = f"{y}.column", f"{y}.sum"
            nodes.append(reshaped(bias[0], [outputs, 1], column))
            nodes.append(helper.make_node("Add", [result, column], [total], total))
            result = total
        return [*nodes, reshaped(result, [1, outputs, rows, columns], y)]

    return replace_nodes(model, product)


def _is_product(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> bool:
    if node.op_type != "Conv":
        return False
    x, weight = (shapes.get(name, []) for name in node.input[:2])
    plain = all(
        set(helper.get_attribute_value(a)) <= {0 if a.name == "pads" else 1}
        for a in node.attribute
        if a.name in ("pads", "strides", "dilations")
    )
    group = next((a.i for a in node.attribute if a.name == "group"), 1)
    return plain and group == 1 and len(x) == 4 and x[0] == 1 and all(x) and weight[2:] == [1, 1]
