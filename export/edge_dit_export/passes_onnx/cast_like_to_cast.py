"""CastLike -> Cast, or nothing where the type is right already.

    CastLike(x, like)  -> x                 of one type
    CastLike(x, like)  -> Cast(x, to=type of like)

onnxscript 0.7 writes the scale of an attention as CastLike(scale, query), so the query counts as
an input of it, and onnxruntime-training 1.19.2 has no gradient for CastLike.
"""

from __future__ import annotations

import onnx
from onnx import helper


def cast_like_to_cast(model: onnx.ModelProto) -> int:
    """Rewrite every CastLike of ``model`` whose two types are known, in place.

    Returns:
        Number of nodes rewritten.
    """
    types = _types(model)
    kept, renamed, count = [], {}, 0
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
        source, target = (types.get(name, 0) for name in node.input) if _is(node) else (0, 0)
        if not source or not target:
            kept.append(node)
        elif source == target and not _is_output(model, node.output[0]):
            renamed[node.output[0]] = node.input[0]
            count += 1
        else:
            kept.append(helper.make_node("Cast", node.input[:1], node.output, node.name, to=target))
            count += 1
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return count


def _is(node: onnx.NodeProto) -> bool:
    return node.op_type == "CastLike"


def _is_output(model: onnx.ModelProto, name: str) -> bool:
    return any(value.name == name for value in model.graph.output)


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every value that has one, by name."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = [*graph.input, *graph.value_info, *graph.output]
    constants = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {value.name: value.type.tensor_type.elem_type for value in values} | constants
