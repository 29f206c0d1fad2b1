"""Rewrite rotations as matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edge_dit.models.rotation import block_of, hadamard, rotate
from edge_dit_export.passes._graph import add_buffer, calls, insert, replace, shape, value

aten: Any = torch.ops.aten


def rotations_to_mm(module: fx.GraphModule) -> int:
    """Write `edge_dit.models.rotation.rotate` as a product of rows of channels with one matrix:

        x [..., K] -> x [M K/B, B] H [B, B] -> [..., K]

    Returns:
        Number of rotations rewritten.
    """
    rotations = calls(module, rotate._opoverload)
    for node in rotations:
        (x,) = node.args
        block = block_of(shape(node)[-1])
        matrix = add_buffer(module, node, f"hadamard_{block}", hadamard(block))
        if not value(x).is_contiguous():
            x = insert(node, aten.clone.default, x, memory_format=torch.contiguous_format)
        rows = insert(node, aten.view.default, x, [-1, block])
        mixed = insert(node, aten.mm.default, rows, matrix)
        replace(node, insert(node, aten.view.default, mixed, list(shape(node))))
    return len(rotations)
