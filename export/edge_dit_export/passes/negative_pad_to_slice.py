"""Rewrite padding by a negative amount as a slice."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edge_dit_export.passes._graph import calls, insert, replace, shape

aten: Any = torch.ops.aten


def negative_pad_to_slice(module: fx.GraphModule) -> int:
    """constant_pad_nd with amounts <= 0 -> slices: the gradient of a padding.

    torch and ONNX define negative pads, but not every ONNX runtime supports them, and ExecuTorch
    1.5.1's kernel refuses them at run time.

    Returns:
        Number of pads rewritten.
    """
    count = 0
    for node in calls(module, aten.constant_pad_nd.default):
        x, pads = node.args[:2]
        if max(pads) > 0:
            continue
        cut = x
        # Pads go from the last dimension forwards, as (before, after).
        for back, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True), start=1):
            if before or after:
                dim = len(shape(x)) - back
                cut = insert(node, aten.slice.Tensor, cut, dim, -before, shape(x)[dim] + after)
        # A pad's result is contiguous, and views of it rely on that.
        replace(node, insert(node, aten.clone.default, cut, memory_format=torch.contiguous_format))
        count += 1
    return count
