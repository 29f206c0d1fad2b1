"""Every variant of every family, small: real diffusers classes, fixed non-trivial weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from edge_dit.contract.names import STORED, Tail
from edge_dit.models.families import family_of
from edge_dit.models.families.family import Family, Prompt
from edge_dit.models.subgraph import (
    TrainableSubgraph,
    add_lora,
    as_batch,
    can_carry_lora,
    difference,
    inner_runs,
    lora_modules,
    lora_name,
)
from edge_dit.pictures.masks import of_tokens

GRID = (2, 4)
"""Token grid: not square, so that rows and columns cannot be mixed up unseen. Qwen-Image 2.1 has
even numbers only.
"""
TEXT = 7
"""Text tokens, of which the last two are padding where the family masks."""
TEXTS = {"z_image": 34}
"""Family -> text tokens, if it needs another number: 32 without padding is a multiple of 32."""
RANK, ALPHA = 2, 3.0

_SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 4,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "sample_size": 8,
}
_FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
    "axes_dims_rope": (4, 6, 6),
}
_SD3 = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 12,
    "pos_embed_max_size": 12,
}
_PIXART = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 4,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "sample_size": 16,
}
_QWEN = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
_LUMINA2 = {
    "in_channels": 4,
    "hidden_size": 32,
    "num_layers": 4,
    "num_refiner_layers": 1,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "multiple_of": 8,
    "axes_dim_rope": (4, 2, 2),
    "axes_lens": (300, 16, 16),
    "cap_feat_dim": 24,
}
_Z_IMAGE = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 4,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 24,
    "axes_dims": (4, 6, 6),
    "axes_lens": (520, 16, 16),
}
_KREA2 = {
    "in_channels": 16,
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "timestep_embed_dim": 16,
    "text_hidden_dim": 24,
    "num_text_layers": 2,
    "text_num_attention_heads": 2,
    "text_num_key_value_heads": 1,
    "text_intermediate_size": 32,
    "num_layerwise_text_blocks": 1,
    "num_refiner_text_blocks": 1,
    "axes_dims_rope": (4, 6, 6),
}
_QWEN21 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "context_in_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}

_CHROMA = {
    **{key: value for key, value in _FLUX.items() if key != "pooled_projection_dim"},
    "approximator_num_channels": 16,
    "approximator_hidden_dim": 20,
    "approximator_layers": 2,
}
_FLUX2 = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sana": ("sana", _SANA),
    "sana-1.5": ("sana", {**_SANA, "qk_norm": "rms_norm_across_heads"}),
    "sana-sprint": (
        "sana",
        {**_SANA, "qk_norm": "rms_norm_across_heads", "guidance_embeds": True},
    ),
    "flux-dev": ("flux", {**_FLUX, "guidance_embeds": True}),
    "flux-schnell": ("flux", {**_FLUX, "guidance_embeds": False}),
    "sd3-medium": ("sd3", _SD3),
    "sd3.5-medium": ("sd3", {**_SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}),
    "sd3.5-large": ("sd3", {**_SD3, "qk_norm": "rms_norm"}),
    "pixart-sigma": ("pixart", _PIXART),
    "qwen-image": ("qwen_image", _QWEN),
    "qwen-image-zero-cond": ("qwen_image", {**_QWEN, "zero_cond_t": True}),
    "lumina2": ("lumina2", _LUMINA2),
    "chroma": ("chroma", _CHROMA),
    "flux2-klein": ("flux2", _FLUX2),
    "z-image": ("z_image", _Z_IMAGE),
    "krea-2": ("krea2", _KREA2),
    "qwen-image-2.1": ("qwen_image21", _QWEN21),
}
"""Name -> family and configuration. Every model has four blocks; those of FLUX.1, Chroma and FLUX.2
go from double to single between the second and the third.
"""
SPLITS = {
    "whole": (0, 1, 2, 3),
    "start": (0, 1),
    "across": (1, 2),
    "end": (2, 3),
    "apart": (0, 3),
}
"""Numbers of the trained blocks."""


def transformer(variant: str) -> Any:
    """The variant's transformer; every parameter is random, none is zero or one."""
    family, config = VARIANTS[variant]
    torch.manual_seed(0)
    model = getattr(diffusers, family_of(family).transformer)(**config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:  # norms start at 1, biases at 0: a swap would go unseen
            base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.data.normal_(base, 0.1)
    return model


def text_of(variant: str) -> int:
    """Text tokens of a variant's case."""
    return TEXTS.get(VARIANTS[variant][0], TEXT)


@dataclass(frozen=True)
class Case:
    """A transformer, and one draw's inputs of its stock forward."""

    family: Family
    model: Any
    inputs: dict[str, Any]
    target: Tensor


def case(variant: str, seed: int = 5) -> Case:
    """A variant with random inputs."""
    family = family_of(VARIANTS[variant][0])
    model = transformer(variant)
    generator = torch.Generator().manual_seed(seed)
    latents, prompt = family.blank(model, GRID, text_of(variant))
    latents = torch.randn(latents.shape, generator=generator)
    prompt = _filled(prompt, generator)
    inputs = family.inputs(model, latents, 321.0, prompt, GRID)
    return Case(family, model, inputs, torch.randn(latents.shape, generator=generator))


def _filled(prompt: Prompt, generator: torch.Generator) -> Prompt:
    filled = {}
    for name, value in prompt.items():
        if name.endswith("mask"):
            filled[name] = value.clone()
            filled[name][:, -2:] = 0
        else:
            filled[name] = torch.randn(value.shape, generator=generator)
    return filled


def with_lora(
    made: Case, trained: Sequence[int], everywhere: bool = False, tail: Tail = STORED
) -> None:
    """Put LoRA with a random B on the trained blocks of the model, by the family's own targets or
    on every module that can carry it.
    """
    targets = _all_targets(made) if everywhere else made.family.lora_targets
    modules = lora_modules(made.family, made.model, trained, targets, tail)
    add_lora(made.model, modules, RANK, ALPHA, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)


def _all_targets(made: Case) -> list[str]:
    blocks = made.family.blocks(made.model).values()
    inside = [entry for block in blocks for entry in block.named_modules()]
    return list(dict.fromkeys(name for name, module in inside if can_carry_lora(module)))


def subgraph(
    made: Case,
    trained: Sequence[int],
    weight: float | Tensor | None = None,
    tail: Tail = STORED,
) -> tuple[TrainableSubgraph, dict[str, Tensor]]:
    """The trainable sub-graph of a case, and its draw as precompute would store it."""
    family, model = made.family, made.model
    with torch.no_grad(), _lora_off(model):
        state, cond = family.begin(model, made.inputs)
        states = [state]
        for block in family.blocks(model).items():
            states.append(family.run_block(*block, states[-1], cond, GRID))
        residual = states[-1].image - states[trained[-1] + 1].image
        inner = {
            first: difference(states[behind], states[first])
            for behind, first in inner_runs(trained).items()
        }
    stored = residual if tail == STORED else None
    sub = TrainableSubgraph(model, family, trained, GRID, tail)
    return sub, as_batch(states[trained[0]], stored, sub.reads(cond), made.target, weight, inner)


def mask(made: Case) -> Tensor:
    """A loss mask of the case's draw: some tokens do not count, the others by different weights."""
    shape = 4 * GRID[0], 4 * GRID[1]
    rng = np.random.default_rng(5)
    patch = np.clip(rng.random(shape) * 1.5 - 0.25, 0, 1).astype(np.float32)
    patch[:4, :4] = 0
    return torch.from_numpy(of_tokens(patch, GRID, made.target.shape))


@contextmanager
def _lora_off(model: nn.Module) -> Iterator[None]:
    """Base weights only, as when a bank is made."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    yield
    for layer in layers:
        layer.enable_adapters(True)


def stock_gradients(made: Case) -> dict[str, Tensor]:
    """LoRA gradients by diffusers name, by autograd through the stock forward."""
    found = made.family.learned(made.family.forward(made.model, made.inputs))
    torch.nn.functional.mse_loss(found, made.target).backward()
    return {
        lora_name(name): p.grad.clone()
        for name, p in made.model.named_parameters()
        if p.requires_grad
    }
