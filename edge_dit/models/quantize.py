"""Round frozen weights to fewer bytes: float16, or int8 with one scale per output channel, as they
are or rotated (`edge_dit.models.rotation`).

Only matrices (linear layers and 1x1 convolutions) are rounded; everything else stays float32. A
model is rounded before it is exported, so PyTorch computes with the same numbers that a bundle
holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edge_dit.contract.targets import INT8, ROTATED, WIDE
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


def rounded(weight: Tensor, dtype: str) -> Tensor:
    """A float32 weight after it was stored as ``dtype`` and read back; rotated, with `ROTATED`."""
    if dtype == ROTATED:
        return rounded(rotated_matrix(weight), INT8)
    if dtype == "float16":
        return weight.half().float()
    if dtype == INT8:
        values, scale = to_int8(weight)
        return values.float() * scale.reshape(-1, *[1] * (weight.ndim - 1))
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
    """Round the matrices of ``model`` to ``dtype``, in place. With `ROTATED` they become W H, and
    their modules take them so.
    """
    _round(model, dict.fromkeys(matrices(model), dtype))


def round_subgraph(subgraph: TrainableSubgraph, dtype: str) -> None:
    """Round the matrices of a sub-graph as a device stores them, in place; see `kinds_of`."""
    _round(subgraph, kinds_of(subgraph, dtype))


def kinds_of(subgraph: TrainableSubgraph, dtype: str) -> dict[str, str]:
    """How a device stores each matrix of a sub-graph, by parameter name: as ``dtype``. But only
    those of blocks are rotated.
    """
    blocks = tuple(f"{name}." for name in (*subgraph.order, *subgraph.after))
    return {
        name: dtype if dtype != ROTATED or name.startswith(blocks) else INT8
        for name in matrices(subgraph)
    }


def _round(model: nn.Module, kinds: dict[str, str]) -> None:
    for name, kind in kinds.items():
        module: Any = model.get_submodule(name.removesuffix(".weight"))
        if kind != WIDE and not is_rotated(module):
            module.weight.data = rounded(module.weight.data, kind)
            if kind == ROTATED:
                take_for_rotated(module)
