"""Stable Diffusion 3 and 3.5: SD3Transformer2DModel.

Text (77 CLIP tokens, then T5's) and image tokens attend jointly; some blocks of SD3.5-medium attend
over the image a second time (attn2). The last block returns no text. No text is masked: padding
takes part, so text always has its full length.

Conditioning (D = width):

    temb   [1, D]   of timestep and pooled text
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from edge_dit.models.families.family import (
    Conditioning,
    Family,
    Grid,
    Prompt,
    longest,
    tokenizer_of,
    unpatchify,
)
from edge_dit.models.objective import FlowMatching, flow_sigmas

T5_TOKENS = 77
"""max_sequence_length of diffusers' train_dreambooth_lora_sd3.py."""


class SD3(Family):
    """See the module."""

    name = "sd3"
    transformer = "SD3Transformer2DModel"
    autoencoder = "AutoencoderKL"
    joint = True
    # diffusers' train_dreambooth_lora_sd3.py
    lora_targets = (
        *(f"attn.{proj}" for proj in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn.{proj}" for proj in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    )
    text_output = (
        "attn.add_q_proj",
        "attn.to_add_out",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    per_prompt = ()
    sample_options: ClassVar[dict[str, Any]] = {
        "num_inference_steps": 28,
        "max_sequence_length": T5_TOKENS,
    }

    def objective(self, scheduler: Mapping[str, Any]) -> FlowMatching:
        """See `Family.objective`: the stock script draws noise levels logit-normally and takes the
        loss of the predicted image (precondition_outputs, after sec. 5 of arXiv 2206.00364).
        """
        return FlowMatching(flow_sigmas(scheduler), logit_normal=True, precondition=True)

    def text_tokens(self, folder: Path, prompts: list[str]) -> int:
        """The full text length, whatever the prompts: padding takes part in attention. CLIP sees
        the first 77 tokens of a longer prompt, as in the pipeline; T5 must see all. Without T5 the
        pipeline puts zeros in its place, and CLIP must see all.
        """
        clip = tokenizer_of(folder)
        tokenizer, limit = clip, clip.model_max_length
        if (folder / "text_encoder_3").is_dir():
            tokenizer, limit = tokenizer_of(folder, "tokenizer_3"), T5_TOKENS
        longest({prompt: len(tokenizer.encode(prompt)) for prompt in prompts}, limit)
        return clip.model_max_length + T5_TOKENS

    def inputs(
        self, model: Any, latents: Tensor, timestep: float, prompt: Prompt, grid: Grid
    ) -> dict[str, Any]:
        """See `Family.inputs`; latents [1, C, h, w]."""
        return {"hidden_states": latents, **prompt, "timestep": torch.tensor([timestep])}

    def conditioning(self, call: Mapping[str, Any]) -> Conditioning:
        """See `Family.conditioning`."""
        return {"temb": call["temb"]}

    def arguments(self, cond: Mapping[str, Tensor], grid: Grid) -> dict[str, Any]:
        """See `Family.arguments`."""
        return {"temb": cond["temb"]}

    def head(self, model: Any, image: Tensor, cond: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """See `Family.head`; the velocity [1, C, h, w]."""
        image = model.proj_out(model.norm_out(image, cond["temb"]))
        return unpatchify(image, grid, model.config.patch_size)

    def blank(self, model: Any, grid: Grid, text: int) -> tuple[Tensor, Prompt]:
        """See `Family.blank`."""
        config = model.config
        rows, columns = (side * config.patch_size for side in grid)
        prompt = {
            "encoder_hidden_states": torch.zeros(1, text, config.joint_attention_dim),
            "pooled_projections": torch.zeros(1, config.pooled_projection_dim),
        }
        return torch.zeros(1, config.in_channels, rows, columns), prompt

    @torch.no_grad()
    def encode_image(self, vae: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """See `Family.encode_image`; the inverse of what StableDiffusion3Pipeline decodes."""
        latents = vae.encode(pixels).latent_dist.sample(generator)
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: list[str], tokens: int) -> list[Prompt]:
        """See `Family.encode_prompts`."""
        encoded = []
        for prompt in prompts:
            embeds, _, pooled, _ = pipeline.encode_prompt(
                prompt,
                None,
                None,
                device=torch.device("cpu"),
                do_classifier_free_guidance=False,
                max_sequence_length=T5_TOKENS,
            )
            named = {"encoder_hidden_states": embeds.float(), "pooled_projections": pooled.float()}
            encoded.append(named)
        return encoded


FAMILY = SD3()
