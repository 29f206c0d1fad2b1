"""Give every LayerNormalization what its gradient needs in onnxruntime-training 1.19.2.

    LayerNormalization(x, scale) -> y
    LayerNormalization(x, own scale, own bias) -> y, mean, inverse standard deviation

The gradient builder reads the bias and the two statistics even when they are left out, and names
gradients after the scale and bias, so nodes that share a constant collide ("Duplicate definition of
name (..._grad)", microsoft/onnxruntime issue 19427).
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper


def complete_layer_norm(model: onnx.ModelProto) -> None:
    """Complete every LayerNormalization of ``model`` in place; its values do not change."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for number, node in enumerate(n for n in graph.node if n.op_type == "LayerNormalization"):
        prefix = f"layer_norm_{number}"
        scale = constants.get(node.input[1])
        if scale is None:
            # A frozen weight that is a graph input belongs to one node already.
            shape = _input_shape(graph, node.input[1])
        else:
            own = onnx.TensorProto()
            own.CopyFrom(scale)
            own.name = node.input[1] = f"{prefix}.scale"
            graph.initializer.append(own)
            shape = tuple(scale.dims)
        if len(node.input) < 3:
            bias = numpy_helper.from_array(np.zeros(shape, np.float32), f"{prefix}.bias")
            graph.initializer.append(bias)
            node.input.append(bias.name)
        statistics = [f"{prefix}.mean", f"{prefix}.inverse_std"]
        node.output.extend(statistics[len(node.output) - 1 :])
    used = {name for node in graph.node for name in node.input}
    for name in constants.keys() - used:
        graph.initializer.remove(constants[name])


def _input_shape(graph: onnx.GraphProto, name: str) -> tuple[int, ...]:
    for value in graph.input:
        if value.name == name:
            return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    raise ValueError(f"{name}: scale of a LayerNormalization, neither a constant nor an input")
