"""1x1 convolutions of one image -> matrix products.

    Conv(x, W, b)  -> Reshape(MatMul(Reshape(W), Reshape(x)) + Reshape(b))
    x [1, C, H, W], W [O, C, 1, 1]       W [O, C], x [C, H W], b [O, 1]

The weights of onnxruntime-training's graphs are inputs, for which its convolution has no fast way,
and its ConvGrad is slower still: on SANA-0.6B's two of a block they took half of the step.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edge_dit_export.passes_onnx._graph import shapes_of


def conv1x1_to_matmul(model: onnx.ModelProto) -> int:
    """Rewrite every 1x1 convolution of one group, stride 1 and one image, in place.

    Returns:
        Number of nodes rewritten.
    """
    graph = model.graph
    shapes = shapes_of(model)
    nodes, count = [], 0
    for node in graph.node:
        if not _is_product(node, shapes):
            nodes.append(node)
            continue
        x, weight, *bias = node.input
        _, channels, rows, columns = shapes[x]
        outputs, name = shapes[weight][0], node.output[0]
        sizes = {
            "x": [channels, rows * columns],
            "weight": [outputs, channels],
            "bias": [outputs, 1],
            "y": [1, outputs, rows, columns],
        }
        for kind, size in sizes.items():
            graph.initializer.append(
                numpy_helper.from_array(np.array(size, np.int64), f"{name}.{kind}.shape")
            )

        def reshaped(value: str, kind: str, output: str, name: str = name) -> onnx.NodeProto:
            return helper.make_node("Reshape", [value, f"{name}.{kind}.shape"], [output], output)

        flat, matrix, product = f"{name}.flat", f"{name}.matrix", f"{name}.product"
        nodes += [
            reshaped(x, "x", flat),
            reshaped(weight, "weight", matrix),
            helper.make_node("MatMul", [matrix, flat], [product], product),
        ]
        if bias:
            column, total = f"{name}.column", f"{name}.sum"
            nodes += [
                reshaped(bias[0], "bias", column),
                helper.make_node("Add", [product, column], [total], total),
            ]
            product = total
        nodes.append(reshaped(product, "y", name))
        count += 1
    del graph.node[:]
    graph.node.extend(nodes)
    return count


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
