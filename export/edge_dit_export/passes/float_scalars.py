"""Turn integer scalars in arithmetic on float tensors into floats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from edge_dit_export.passes._graph import calls, value

aten: Any = torch.ops.aten


def float_scalars(module: fx.GraphModule) -> int:
    """Write x * 32 as x * 32.0, in the four operations of arithmetic on float tensors.

    ExecuTorch 1.5.1 turns every such scalar into a tensor. An integer becomes an int64 tensor,
    which is converted to float32 in every step.

    Returns:
        Number of scalars replaced.
    """
    count = 0
    targets = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
    for node in calls(module, *targets):
        result = value(node)
        if not isinstance(result, Tensor) or not result.is_floating_point():
            continue
        args = tuple(float(arg) if type(arg) is int else arg for arg in node.args)
        count += sum(type(arg) is int for arg in node.args)
        node.args = args
    return count
