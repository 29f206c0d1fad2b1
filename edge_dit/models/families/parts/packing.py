"""What families have in common that pack 2 x 2 latents into a token and run double-stream blocks
before single-stream ones: FLUX.1, Chroma, FLUX.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edge_dit.models.families.family import Grid
from edge_dit.models.families.parts.common import rotary_misfits
from edge_dit.models.families.parts.switches import DEEPEST, Misfits, Rules, one_of, optional, whole

CONTAINERS = {
    "transformer_blocks": "num_layers",
    "single_transformer_blocks": "num_single_layers",
}
"""Double-stream blocks, then single-stream ones."""
MAX_TEXT_TOKENS = 512
"""max_sequence_length of their pipelines."""
SWITCHES: Rules = {
    "patch_size": one_of(1, why="the pipeline packs latents 2 x 2 whatever it says"),
    "in_channels": whole(),
    "out_channels": optional(whole()),
    "num_layers": whole(DEEPEST),
    "num_single_layers": whole(DEEPEST, least=0),
    "attention_head_dim": whole(),
    "num_attention_heads": whole(),
    "joint_attention_dim": whole(),
}
LORA_TARGETS = (
    *(f"attn.{proj}" for proj in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{proj}" for proj in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{ff}.net.{layer}" for ff in ("ff", "ff_context") for layer in ("0.proj", "2")),
)
"""diffusers' train_dreambooth_lora_flux.py; single blocks have the first three only."""
TEXT_OUTPUT = (
    "attn.add_q_proj",
    "attn.to_add_out",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)
"""Modules of a double block of FLUX.1 and Chroma that only feed its text output."""


def misfits(config: Mapping[str, Any]) -> Misfits:
    """Channels that cannot be packed, and widths that do not add up."""
    if config["in_channels"] % 4:
        yield "in_channels", "a multiple of 4: the pipeline packs 2 x 2 latents into a token"
    if config["out_channels"] not in (None, config["in_channels"]):
        yield "out_channels", f"{config['in_channels']}, the in_channels, or null"
    yield from rotary_misfits(config)


def places(grid: Grid) -> Tensor:
    """Layer (0), row and column of every image token, [N, 3]."""
    rows, columns = grid
    found = torch.zeros(rows, columns, 3)
    found[..., 1] = torch.arange(rows)[:, None]
    found[..., 2] = torch.arange(columns)[None, :]
    return found.reshape(rows * columns, 3)


def blank_latents(config: Any, grid: Grid) -> Tensor:
    """Packed latents [1, N, C], zeros."""
    return torch.zeros(1, grid[0] * grid[1], config.in_channels)
