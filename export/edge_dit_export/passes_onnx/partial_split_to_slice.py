"""Split of which a part goes unused -> one Slice for every part in use.

    Split(x, sizes) -> a, unused, c
    Slice(x, 0, a's end) -> a,    Slice(x, c's start, c's end) -> c

onnxruntime-training 1.19.2 makes the gradient of a Split by joining those of its parts, and leaves
out a part without one: the result is too small.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edge_dit_export.passes_onnx._graph import add_int64, replace_nodes, shapes_of


def partial_split_to_slice(model: onnx.ModelProto) -> int:
    """Rewrite every Split of which not all parts are used, in place.

    Args:
        model: the sizes of its Splits must be constant.

    Returns:
        Number of nodes rewritten.

    Raises:
        ValueError: the sizes of such a Split are not known.
    """
    graph = model.graph
    used = {name for node in graph.node for name in node.input} | {v.name for v in graph.output}
    sides = shapes_of(model)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}

    def slices(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type != "Split" or all(name in used for name in node.output):
            return None
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        ends = np.cumsum(_sizes(node, axis, sides, constants))
        nodes = []
        for name, start, end in zip(node.output, [0, *ends[:-1]], ends, strict=True):
            if name and name in used:
                bounds = {"start": start, "end": end, "axis": axis}
                names = [add_int64(model, f"{name}.{n}", [value]) for n, value in bounds.items()]
                inputs = [node.input[0], *names]
                nodes.append(helper.make_node("Slice", inputs, [name], f"{name}.slice"))
        return nodes

    return replace_nodes(model, slices)


def _sizes(
    node: onnx.NodeProto,
    axis: int,
    sides: Mapping[str, list[int]],
    constants: Mapping[str, np.ndarray],
) -> list[int]:
    """Sizes of a Split's parts along ``axis``."""
    if len(node.input) == 2 and node.input[1] in constants:
        return constants[node.input[1]].tolist()
    if len(node.input) == 1 and sides.get(node.input[0], [0])[axis]:
        side, count = sides[node.input[0]][axis], len(node.output)
        size = -(-side // count)  # the last part is smaller if need be
        return [*[size] * (count - 1), side - size * (count - 1)]
    raise ValueError(f"{node.name}: a Split whose sizes are not known")
