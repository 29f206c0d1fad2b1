"""Share equal views of one tensor."""

from __future__ import annotations

from torch import fx

from edge_dit_export.passes._graph import calls, replace
from edge_dit_export.passes.merge_shape_ops import SHAPE_OPS


def share_shape_ops(module: fx.GraphModule) -> int:
    """Replace equal shape operations on one tensor by the first of them.

    Repeated arithmetic stays: computing a sigmoid again in the backward pass costs time, but
    keeping the first one until then would cost memory.

    Returns:
        Number of operations removed.
    """
    first: dict[object, fx.Node] = {}
    count = 0
    for node in calls(module, *SHAPE_OPS):
        key = (node.target, node.args[0], str(node.args[1:]))
        if key in first:
            replace(node, first[key])
            count += 1
        else:
            first[key] = node
    return count
