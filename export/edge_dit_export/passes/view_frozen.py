"""Turn views of frozen weights into buffers that share the same bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edge_dit_export.passes._graph import add_buffer, calls, frozen, replace, shape

aten: Any = torch.ops.aten


def view_frozen(module: fx.GraphModule) -> int:
    """Replace a view of a frozen weight by a buffer that shares the weight's memory.

    The ONNX exporter would fold the view into a second copy of the weight, and store the copy.

    Returns:
        Number of views rewritten.
    """
    count = 0
    for node in calls(module, aten.view.default):
        weight = frozen(module, node.args[0])
        if weight is None or not weight.is_contiguous():
            continue
        name = f"{node.args[0].target}__as_{'x'.join(map(str, shape(node)))}"  # type: ignore[union-attr]
        replace(node, add_buffer(module, node, name, weight.view(shape(node))))
        count += 1
    return count
