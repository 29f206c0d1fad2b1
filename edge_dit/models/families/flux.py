"""FLUX.1 dev and schnell: FluxTransformer2DModel.

Double-stream blocks, then single-stream blocks. Text and image tokens attend jointly in both, and
both kinds take and return the pair (text, image). FLUX masks no text: padding takes part in
attention, so text always has the pipeline's full length.

Conditioning (D = width, S = text and image tokens together, d = head width):

    temb                 [1, D]   embedding of timestep, pooled text and, in dev, guidance
    rope_cos, rope_sin   [S, d]   positions, the same for every draw
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from edge_dit.contract.objective import FlowMatching
from edge_dit.models.families.family import (
    Conditioning,
    Family,
    Grid,
    Prompt,
    blank_pooled,
    longest,
    pooled_prompt,
    tokenizer_of,
)
from edge_dit.models.families.parts import packing
from edge_dit.models.families.parts.common import SHIFTED_SWITCHES, flow_objective
from edge_dit.models.families.parts.surroundings import SoftmaxSurroundings
from edge_dit.models.families.parts.switches import DEEPEST, Misfits, Rules, axes, flag, whole

GUIDANCE = 3.5
"""Guidance with which diffusers' train_dreambooth_lora_flux.py trains dev."""


def _blocks_module() -> ModuleType:
    from diffusers.models.transformers import transformer_flux

    return transformer_flux


class Flux(Family):
    """FLUX.1 dev and schnell."""

    name = "flux"
    transformer = "FluxTransformer2DModel"
    autoencoder = "AutoencoderKL"
    containers = packing.CONTAINERS
    joint = True
    lora_targets = packing.LORA_TARGETS
    text_output = packing.TEXT_OUTPUT
    per_prompt = ("rope_cos", "rope_sin")
    placed = ("rope_cos", "rope_sin")
    surroundings = SoftmaxSurroundings(_blocks_module)
    needs = ("text_encoder_2", "tokenizer_2")
    text_widths: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "pooled_projection_dim": ("text_encoder",),
        "joint_attention_dim": ("text_encoder_2",),
    }
    packed = 4
    guided_by = ""  # guidance_scale is an input of the transformer
    switches: ClassVar[Rules] = {
        **packing.SWITCHES,
        "num_layers": whole(DEEPEST, least=0),
        "pooled_projection_dim": whole(),
        "guidance_embeds": flag(),
        "axes_dims_rope": axes(),
    }
    vae_switches = SHIFTED_SWITCHES

    def misfits(self, config: Mapping[str, Any]) -> Misfits:
        """Blocks of neither kind, channels that cannot be packed, widths that do not add up."""
        if not config["num_layers"] + config["num_single_layers"]:
            yield "num_layers", "at least 1 block, of either kind"
        yield from packing.misfits(config)

    def multiple(self, config: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        """Pixels per side of a token; the pipeline packs 2 x 2 latents into one."""
        return self.factor(vae) * 2

    def timestep_factor(self, config: Mapping[str, Any]) -> float:
        """The pipeline divides by 1000."""
        return 1 / 1000

    def objective(self, scheduler: Mapping[str, Any]) -> FlowMatching:
        """The velocity, noise levels drawn evenly."""
        return flow_objective(scheduler)

    def text_tokens(self, folder: Path, prompts: list[str]) -> int:
        """The full text length, whatever the prompts: padding takes part in attention."""
        tokenizer = tokenizer_of(folder, "tokenizer_2")
        limit = min(packing.MAX_TEXT_TOKENS, tokenizer.model_max_length)
        longest({prompt: len(tokenizer.encode(prompt)) for prompt in prompts}, limit)
        return limit

    def inputs(
        self, model: Any, latents: Tensor, timestep: float, prompt: Prompt, grid: Grid
    ) -> dict[str, Any]:
        """Arguments of the stock forward; latents [1, N, C], packed."""
        text = prompt["encoder_hidden_states"].shape[1]
        return {
            "hidden_states": latents,
            **prompt,
            "timestep": torch.tensor([timestep * self.timestep_factor(model.config)]),
            "guidance": torch.tensor([GUIDANCE]) if model.config.guidance_embeds else None,
            "img_ids": packing.places(grid),
            "txt_ids": torch.zeros(text, 3),
        }

    def conditioning(self, call: Mapping[str, Any]) -> Conditioning:
        """The tensors of the module's table."""
        cos, sin = call["image_rotary_emb"]
        return {"temb": call["temb"], "rope_cos": cos, "rope_sin": sin}

    def arguments(self, cond: Mapping[str, Tensor], grid: Grid) -> dict[str, Any]:
        """Temb and the rotary embedding as a pair (cos, sin)."""
        return {"temb": cond["temb"], "image_rotary_emb": (cond["rope_cos"], cond["rope_sin"])}

    def head(self, model: Any, image: Tensor, cond: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The velocity [1, N, C], packed."""
        return model.proj_out(model.norm_out(image, cond["temb"]))

    def blank(self, model: Any, grid: Grid, text: int) -> tuple[Tensor, Prompt]:
        """Latents [1, N, C], packed, and a prompt of ``text`` tokens."""
        return packing.blank_latents(model.config, grid), blank_pooled(model.config, text)

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: list[str], tokens: int) -> list[Prompt]:
        """Text [1, tokens, D] and pooled text [1, P] of each prompt."""
        encoded = []
        for prompt in prompts:
            embeds, pooled, _ = pipeline.encode_prompt(
                prompt, None, device=torch.device("cpu"), max_sequence_length=tokens
            )
            encoded.append(pooled_prompt(embeds, pooled))
        return encoded

    def sample_options(self, pipeline: Any, pictures: int) -> dict[str, Any]:
        """20 steps with the guidance and the text length of training."""
        limit = min(packing.MAX_TEXT_TOKENS, pipeline.tokenizer_2.model_max_length)
        return {
            "num_inference_steps": 20,
            "guidance_scale": GUIDANCE,
            "max_sequence_length": limit,
        }


FAMILY = Flux()
