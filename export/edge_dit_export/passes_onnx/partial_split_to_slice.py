"""A Split with unused parts -> one Slice for each part that is used.

    Split(x, sizes) -> a, unused, c
    Slice(x, 0, a's end) -> a,    Slice(x, c's start, c's end) -> c

onnxruntime-training 1.19.2 computes the gradient of a Split by joining the gradients of its parts.
It leaves out a part that has none, so the result is too small.
"""

from __future__ import annotations

from itertools import accumulate

import onnx_ir as ir

from edge_dit_export.passes_onnx._graph import constant, sides


def partial_split_to_slice(model: ir.Model) -> int:
    """Rewrite every Split of which not all parts are used, in place.

    Args:
        model: the sizes of its Splits must be constant.

    Returns:
        Number of nodes rewritten.

    Raises:
        ValueError: the sizes of such a Split are not known.
    """
    graph, count = model.graph, 0
    for node in graph:
        used = [bool(part.uses()) or part.is_graph_output() for part in node.outputs]
        if node.op_type != "Split" or all(used):
            continue
        axis = node.attributes.get_int("axis", 0)
        ends = list(accumulate(_sizes(node, axis)))
        bounds = zip([0, *ends[:-1]], ends, strict=True)
        tape = ir.tape.Tape()
        for place in (bound for bound, is_used in zip(bounds, used, strict=True) if is_used):
            tape.op("Slice", [node.inputs[0], *(constant(graph, [n]) for n in (*place, axis))])
        slices = [piece.outputs[0] for piece in tape.nodes]
        parts = [part for part, is_used in zip(node.outputs, used, strict=True) if is_used]
        ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, parts, slices)
        count += 1
    return count


def _sizes(node: ir.Node, axis: int) -> list[int]:
    """Sizes of a Split's parts along ``axis``."""
    x, sizes = (*node.inputs, None)[:2]
    known = ir.convenience.get_const_tensor(sizes) if sizes is not None else None
    if known is not None:
        return known.numpy().tolist()
    shape, count = sides(x), len(node.outputs)
    if sizes is None and shape:
        size = -(-shape[axis] // count)  # the last part is smaller if need be
        return [*[size] * (count - 1), shape[axis] - size * (count - 1)]
    raise ValueError(f"{node.name}: a Split whose sizes are not known")
