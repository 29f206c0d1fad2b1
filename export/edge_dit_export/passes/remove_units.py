"""Remove multiplications and divisions by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edge_dit_export.passes._graph import calls, replace, shape, value

aten: Any = torch.ops.aten


def remove_units(module: fx.GraphModule) -> int:
    """Replace x * 1 and x / 1 by x, which is exact in IEEE arithmetic.

    They come from rescale_output_factor = 1 in diffusers 0.42's attention, and from the gradient
    of the loss with respect to itself.

    Returns:
        Number of operations removed.
    """
    count = 0
    for node in calls(module, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        x, by = node.args
        same = isinstance(x, fx.Node) and value(x).dtype == value(node).dtype
        if same and shape(x) == shape(node) and _is_one(by):
            replace(node, x)
            count += 1
    return count


def _is_one(by: Any) -> bool:
    if isinstance(by, fx.Node):
        return by.target in (aten.full.default, aten.full_like.default) and by.args[1] == 1
    return by == 1
