"""Rewrite a batched product of one matrix as a plain product."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edge_dit_export.passes._graph import calls, insert, replace, shape

aten: Any = torch.ops.aten


def bmm_of_one_to_mm(module: fx.GraphModule) -> int:
    """bmm([1, n, k], [1, k, m]) -> mm([n, k], [k, m]).

    torch 2.13 traces a linear layer whose input is not contiguous as bmm with an expanded weight.
    In an mm the other passes recognise the weight again.

    Returns:
        Number of products rewritten.
    """
    count = 0
    for node in calls(module, aten.bmm.default):
        left, right = node.args
        if shape(left)[0] != 1:
            continue
        a = _matrix(node, left)
        b = _matrix(node, right)
        product = insert(node, aten.mm.default, a, b)
        replace(node, insert(node, aten.unsqueeze.default, product, 0))
        count += 1
    return count


def _matrix(before: fx.Node, node: fx.Node) -> fx.Node:
    return insert(before, aten.squeeze.dims, node, [0])
