"""PixArt-Sigma (arXiv 2403.04692): PixArtTransformer2DModel.

One stream of image tokens; text enters by cross-attention (attn2). The model predicts noise, and a
variance that the loss leaves alone: half of the output channels.

Conditioning (D = width, L = text tokens):

    encoder_hidden_states   [1, L, D]   projected caption
    encoder_attention_mask  [1, 1, L]   0 for a token, -10000 for padding
    timestep                [1, 6 D]    modulation of the blocks
    embedded_timestep       [1, D]      modulation of the head

Padding has exactly no weight, so text is cut to the longest prompt of a job. The pipeline has no
``load_lora_weights``: adapters are PEFT folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from edge_dit.errors import BadInput
from edge_dit.models.families.family import (
    INCOMPLETE,
    Conditioning,
    Family,
    Grid,
    Prompt,
    cut,
    longest,
    read_config,
    tokenizer_of,
    unpatchify,
)
from edge_dit.models.objective import EpsilonPrediction, alphas_cumprod

MAX_TEXT_TOKENS = 300
"""PixArtSigmaPipeline's max_sequence_length."""


class PixArt(Family):
    """See the module."""

    name = "pixart"
    transformer = "PixArtTransformer2DModel"
    autoencoder = "AutoencoderKL"
    watched = "adaln_single"
    head_modules = ("norm_out", "proj_out", "scale_shift_table")
    # train_scripts/train_pixart_lora_hf.py of PixArt-alpha's authors, within a block
    lora_targets = (
        *(f"attn{n}.{proj}" for n in (1, 2) for proj in ("to_q", "to_k", "to_v", "to_out.0")),
        "ff.net.0.proj",
        "ff.net.2",
    )
    per_prompt = ("encoder_hidden_states", "encoder_attention_mask")
    sample_options: ClassVar[dict[str, Any]] = {
        "num_inference_steps": 20,
        "use_resolution_binning": False,
    }

    def config(self, folder: Path) -> dict[str, Any]:
        """See `Family.config`. Published checkpoints call the class Transformer2DModel; diffusers
        takes it for PixArtTransformer2DModel (models/modeling_utils.py, LegacyModelMixin). None of
        Sigma has micro-conditions: PixArtSigmaPipeline passes none, though the class expects them
        by default at sample_size 128.
        """
        path = folder / "transformer" / "config.json"
        config = read_config(path, self.transformer, "Transformer2DModel")
        if config.get("use_additional_conditions"):
            raise BadInput(
                path,
                found="use_additional_conditions is true",
                expected="false: PixArtSigmaPipeline passes no resolution and no aspect ratio",
                remedy="use a PixArt-Sigma checkpoint; PixArt-Alpha is not supported",
            )
        return {**config, "_class_name": self.transformer, "use_additional_conditions": False}

    def objective(self, scheduler: Mapping[str, Any]) -> EpsilonPrediction:
        """See `Family.objective`."""
        predicted = scheduler.get("prediction_type", "epsilon")
        if predicted != "epsilon":
            raise BadInput(
                "scheduler/scheduler_config.json",
                found=f"prediction_type {predicted!r}",
                expected="epsilon, which PixArt-Sigma predicts",
                remedy=INCOMPLETE,
            )
        return EpsilonPrediction(alphas_cumprod(scheduler))

    def text_tokens(self, folder: Path, prompts: list[str]) -> int:
        """Length of the longest prompt; the pipeline lowercases and strips before it tokenises."""
        tokenizer = tokenizer_of(folder)
        lengths = {prompt: len(tokenizer.encode(prompt.lower().strip())) for prompt in prompts}
        return longest(lengths, MAX_TEXT_TOKENS)

    def inputs(
        self, model: Any, latents: Tensor, timestep: float, prompt: Prompt, grid: Grid
    ) -> dict[str, Any]:
        """See `Family.inputs`; latents [1, C, h, w]."""
        return {
            "hidden_states": latents,
            **prompt,
            "timestep": torch.tensor([timestep]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    def conditioning(self, call: Mapping[str, Any]) -> Conditioning:
        """See `Family.conditioning`."""
        names = ("encoder_hidden_states", "encoder_attention_mask", "timestep")
        return {name: call[name] for name in names} | {"embedded_timestep": call["adaln_single"][1]}

    def arguments(self, cond: Mapping[str, Tensor], grid: Grid) -> dict[str, Any]:
        """See `Family.arguments`."""
        names = ("encoder_hidden_states", "encoder_attention_mask", "timestep")
        return {name: cond[name] for name in names}

    def head(self, model: Any, image: Tensor, cond: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """See `Family.head`; noise and variance [1, 2 C, h, w]."""
        modulation = model.scale_shift_table[None] + cond["embedded_timestep"][:, None]
        shift, scale = modulation.chunk(2, dim=1)
        image = model.proj_out(model.norm_out(image) * (1 + scale) + shift)
        return unpatchify(image, grid, model.config.patch_size)

    def learned(self, prediction: Tensor) -> Tensor:
        """The noise, without the variance."""
        return prediction.chunk(2, dim=1)[0]

    def blank(self, model: Any, grid: Grid, text: int) -> tuple[Tensor, Prompt]:
        """See `Family.blank`."""
        config = model.config
        rows, columns = (side * config.patch_size for side in grid)
        prompt = {
            "encoder_hidden_states": torch.zeros(1, text, config.caption_channels),
            "encoder_attention_mask": torch.ones(1, text),
        }
        return torch.zeros(1, config.in_channels, rows, columns), prompt

    @torch.no_grad()
    def encode_image(self, vae: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """See `Family.encode_image`."""
        return vae.encode(pixels).latent_dist.sample(generator) * vae.config.scaling_factor

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: list[str], tokens: int) -> list[Prompt]:
        """See `Family.encode_prompts`."""
        encoded = []
        for prompt in prompts:
            embeds, mask, _, _ = pipeline.encode_prompt(
                prompt,
                do_classifier_free_guidance=False,
                device=torch.device("cpu"),
                max_sequence_length=MAX_TEXT_TOKENS,
            )
            named = {
                "encoder_hidden_states": embeds.float(),
                "encoder_attention_mask": mask.float(),
            }
            encoded.append(cut(named, "encoder_hidden_states", "encoder_attention_mask", tokens))
        return encoded


FAMILY = PixArt()
