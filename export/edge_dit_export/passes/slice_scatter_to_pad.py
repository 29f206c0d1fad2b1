"""Rewrite scattering into zeros as padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edge_dit_export.passes._graph import calls, insert, replace, shape

aten: Any = torch.ops.aten


def slice_scatter_to_pad(module: fx.GraphModule) -> int:
    """slice_scatter(zeros, x, dim, start, end) -> constant_pad_nd(x): the gradient of a slice.

    ONNX would need ScatterND with an index tensor; in ExecuTorch 1.5.1 it saves filling and
    copying the zeros.

    Returns:
        Number of scatters rewritten.
    """
    count = 0
    for node in calls(module, aten.slice_scatter.default):
        base, x, dim, start, end, step = (*node.args, *(0, None, None, 1)[len(node.args) - 2 :])
        if not _is_zeros(base) or step != 1:
            continue
        ndim, size = len(shape(base)), shape(base)[dim]
        start, end, _ = slice(start, end).indices(size)
        pads = [0, 0] * (ndim - 1 - dim % ndim) + [start, size - end]
        replace(node, insert(node, aten.constant_pad_nd.default, x, pads))
        count += 1
    return count


def _is_zeros(node: fx.Node) -> bool:
    return node.target in (aten.full.default, aten.full_like.default) and node.args[1] == 0
