"""Give every LayerNormalization what its gradient needs in onnxruntime-training 1.19.2.

    LayerNormalization(x, scale) -> y
    LayerNormalization(x, own scale, own bias) -> y, mean, inverse standard deviation

The gradient builder reads the bias and the two statistics even when they are left out, and names
gradients after the scale and bias, so nodes that share a constant collide ("Duplicate definition of
name (..._grad)", microsoft/onnxruntime issue 19427).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edge_dit_export.passes_onnx._graph import sides


def complete_layer_norm(model: ir.Model) -> None:
    """Complete every LayerNormalization of ``model`` in place; its values do not change.

    Raises:
        ValueError: the shape of a scale is not known.
    """
    norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
    for number, node in enumerate(norms):
        prefix = f"layer_norm_{number}"
        _own_scale_and_bias(model.graph, node, prefix)
        node.resize_outputs(3)
        for value, name in zip(node.outputs[1:], ("mean", "inverse_std"), strict=True):
            value.name = value.name or f"{prefix}.{name}"


def _own_scale_and_bias(graph: ir.Graph, node: ir.Node, prefix: str) -> None:
    tape = ir.tape.Tape(graph)
    scale = node.inputs[1]
    shape = sides(scale)
    if scale is None or not shape:
        raise ValueError(f"{node.name}: a LayerNormalization whose scale has no known shape")
    # A frozen weight that is a graph input belongs to one node already.
    if scale.is_initializer() and scale.const_value is not None:
        own = ir.tensor(scale.const_value.numpy(), name=f"{prefix}.scale")
        node.replace_input_with(1, tape.initializer(own))
        if not scale.uses():
            del graph.initializers[str(scale.name)]
    if len(node.inputs) < 3:
        node.resize_inputs(3)
        zeros = ir.tensor(np.zeros(shape, np.float32), name=f"{prefix}.bias")
        node.replace_input_with(2, tape.initializer(zeros))
