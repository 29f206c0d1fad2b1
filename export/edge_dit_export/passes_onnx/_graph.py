"""What rewrites of ONNX graphs share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import numpy_helper


def shapes_of(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Shape of every value that has one, by name; an unknown side is 0."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    values = {
        value.name: [side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.value_info, *graph.output]
        if value.type.tensor_type.HasField("shape")
    }
    return constants | values


def replace_nodes(
    model: onnx.ModelProto, replacement: Callable[[onnx.NodeProto], Sequence[onnx.NodeProto] | None]
) -> int:
    """Put what ``replacement`` returns in the place of each node, in place; None keeps a node.

    Returns:
        Number of nodes replaced.
    """
    nodes, count = [], 0
    for node in model.graph.node:
        found = replacement(node)
        nodes += [node] if found is None else found
        count += found is not None
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return count


def add_int64(model: onnx.ModelProto, name: str, values: Sequence[int]) -> str:
    """Add a constant, int64 [len(values)]; its name."""
    model.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    return name
