"""Round frozen weights to fewer bytes: float16; int8 with one scale per output channel, as they
are or rotated (`edge_dit.models.rotation`); or int4 with one per group of inputs.

Only matrices (linear layers and 1x1 convolutions) are rounded; everything else stays float32. A
model is rounded before it is exported, so PyTorch computes with the same numbers that a bundle
holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edge_dit.contract.targets import INT4, INT8, ROTATED, WIDE
from edge_dit.models.rotation import is_rotated, rotated_matrix, take_for_rotated
from edge_dit.models.subgraph import TrainableSubgraph, can_carry_lora


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and float32 scales [out] of a weight [out, ...]: w = value * scale of its row.

    Values are symmetric, in -127 .. 127. A rounded weight rounds to itself.
    """
    rows = weight.reshape(weight.shape[0], -1)
    scale = rows.abs().amax(dim=1) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    values = torch.round(rows / scale[:, None]).to(torch.int8)
    return values.reshape(weight.shape), scale


GROUP = 32
"""Inputs that share a scale in int4, where their number can be divided so."""
SMALLEST_GROUP = 8
MIDDLE = 8
"""What a value of 0 is stored as in int4."""


def group_of(inputs: int) -> int:
    """Inputs of a matrix that share a scale in int4: the greatest common divisor with `GROUP`, or
    all where that is small.

    Example:
        >>> group_of(2240), group_of(112), group_of(20)
        (32, 16, 20)
    """
    shared = math.gcd(inputs, GROUP)
    return shared if shared >= SMALLEST_GROUP else inputs


def to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [out, ...] of an even number of inputs K in four bits: bytes [out, K / 2] uint8, and
    float32 scales [out, K / group_of(K)].

    Element k of a row is (nibble - `MIDDLE`) * scale of its group. Byte j has the nibble of element
    j in its low half, and that of element j + K / 2 in its high half. Values are symmetric, in
    -7 .. 7; a rounded weight rounds to itself.
    """
    rows = weight.reshape(weight.shape[0], -1)
    groups = rows.reshape(rows.shape[0], -1, group_of(rows.shape[1]))
    scale = groups.abs().amax(dim=2) / 7
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    values = (torch.round(groups / scale[:, :, None]) + MIDDLE).to(torch.uint8).flatten(1)
    low, high = values.chunk(2, dim=1)
    return low | (high << 4), scale


def from_int4(packed: Tensor, scale: Tensor) -> Tensor:
    """float32 [out, K] of what `to_int4` made."""
    values = torch.cat([packed & 15, packed >> 4], dim=1).float() - MIDDLE
    groups = values.reshape(*scale.shape, -1)
    return (groups * scale[:, :, None]).flatten(1)


def rounded(weight: Tensor, dtype: str) -> Tensor:
    """A float32 weight after it was stored as ``dtype`` and read back; rotated, with `ROTATED`."""
    if dtype == ROTATED:
        return rounded(rotated_matrix(weight), INT8)
    if dtype == "float16":
        return weight.half().float()
    if dtype == INT8:
        values, scale = to_int8(weight)
        return values.float() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    if dtype == INT4:
        return from_int4(*to_int4(weight)).reshape(weight.shape)
    return weight


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen weights of ``model`` that can be stored in fewer bytes, by parameter name."""
    return {
        f"{name}.weight": module.weight  # type: ignore[dict-item]
        for name, module in model.named_modules()
        if can_carry_lora(module) and not module.weight.requires_grad  # type: ignore[union-attr]
    }


def round_autoencoder(vae: nn.Module, dtype: str) -> None:
    """Round an autoencoder as a device stores it beside blocks of ``dtype``, in place: its matrices
    and kernels to float16, whatever is fewer bytes than float32.
    """
    if dtype != "float32":
        for parameter in vae.parameters():
            if parameter.ndim > 1:
                parameter.data = rounded(parameter.data, "float16")


def round_frozen(model: nn.Module, dtype: str) -> None:
    """Round the matrices of blocks, or of one, as a device stores them, in place: to ``dtype``, see
    `kind_in_block`. With `ROTATED` they become W H, and their modules take them so.
    """
    _round(model, {n: kind_in_block(w.shape, dtype) for n, w in matrices(model).items()})


def round_subgraph(subgraph: TrainableSubgraph, dtype: str) -> None:
    """Round the matrices of a sub-graph as a device stores them, in place; see `kinds_of`."""
    _round(subgraph, kinds_of(subgraph, dtype))


def kinds_of(subgraph: TrainableSubgraph, dtype: str) -> dict[str, str]:
    """How a device stores each matrix of a sub-graph, by parameter name: as ``dtype``. But only
    those of blocks are rotated or in four bits; the others are in int8.
    """
    blocks = tuple(f"{name}." for name in (*subgraph.order, *subgraph.after))

    elsewhere = INT8 if dtype in (ROTATED, INT4) else dtype
    return {
        name: kind_in_block(weight.shape, dtype) if name.startswith(blocks) else elsewhere
        for name, weight in matrices(subgraph).items()
    }


def kind_in_block(shape: Sequence[int], dtype: str) -> str:
    """How a device stores a block's matrix [out, ...]: as ``dtype``; in int8 where that is int4 and
    the number of inputs is odd.
    """
    return INT8 if dtype == INT4 and math.prod(shape[1:]) % 2 else dtype


def _round(model: nn.Module, kinds: dict[str, str]) -> None:
    for name, kind in kinds.items():
        module: Any = model.get_submodule(name.removesuffix(".weight"))
        if kind != WIDE and not is_rotated(module):
            module.weight.data = rounded(module.weight.data, kind)
            if kind == ROTATED:
                take_for_rotated(module)
