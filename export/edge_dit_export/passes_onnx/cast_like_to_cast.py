"""CastLike -> Cast, or nothing where the type is right already.

    CastLike(x, like)  -> x                 of one type
    CastLike(x, like)  -> Cast(x, to=type of like)

onnxscript 0.7 writes the scale of an attention as CastLike(scale, query), so the query counts as
an input of it, and onnxruntime-training 1.19.2 has no gradient for CastLike.
"""

from __future__ import annotations

import onnx_ir as ir


def cast_like_to_cast(model: ir.Model) -> int:
    """Rewrite every CastLike of which both types are known, in place.

    Args:
        model: a CastLike with an input of unknown type stays: infer types first.

    Returns:
        Number of nodes rewritten.
    """
    count = 0
    for node in model.graph:
        if node.op_type != "CastLike":
            continue
        source, like = node.inputs
        if source is None or like is None or source.dtype is None or like.dtype is None:
            continue
        result = node.outputs[0]
        # A result that is an output of the graph keeps a node, and with it the output's name.
        if source.dtype == like.dtype and not result.is_graph_output():
            result.replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
        else:
            tape = ir.tape.Tape()
            cast = tape.op("Cast", [source], {"to": like.dtype.value}, name=node.name)
            ir.convenience.replace_nodes_and_values(
                model.graph, node, [node], tape.nodes, [result], [cast]
            )
        count += 1
    return count
