"""What rewrites of ONNX graphs share."""

from __future__ import annotations

import onnx


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
