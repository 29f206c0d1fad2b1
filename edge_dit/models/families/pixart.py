"""PixArt-Sigma (arXiv 2403.04692): PixArtTransformer2DModel.

One stream of image tokens; text enters by cross-attention (attn2). The model predicts noise, and a
variance that the loss leaves alone: half of the output channels.

Conditioning (D = width, L = text tokens):

    encoder_hidden_states   [1, L, D]   projected caption
    encoder_attention_mask  [1, 1, L]   0 for a token, -10000 for padding
    timestep                [1, 6 D]    modulation of the blocks
    embedded_timestep       [1, D]      modulation of the head

Padding has a weight of exactly 0, so text is cut to the longest prompt of a job. The pipeline has
no ``load_lora_weights``, so adapters are PEFT folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge_dit.errors import BadInput
from edge_dit.models.families.family import (
    CROSS_ATTENTION,
    INCOMPLETE,
    Conditioning,
    Family,
    Grid,
    Prompt,
    blank_caption,
    blank_latents,
    longest,
    masked_prompt,
    modulated_conditioning,
    read_config,
    tokenizer_of,
    unpatchify,
)
from edge_dit.models.objective import EpsilonPrediction, alphas_cumprod

MAX_TEXT_TOKENS = 300
"""PixArtSigmaPipeline's max_sequence_length."""


class PixArt(Family):
    """PixArt-Sigma."""

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

    def config(self, folder: Path) -> dict[str, Any]:
        """The transformer's configuration.

        Published checkpoints name the class Transformer2DModel; diffusers loads it as
        PixArtTransformer2DModel (models/modeling_utils.py, LegacyModelMixin). Sigma has no
        micro-conditions: PixArtSigmaPipeline passes none, though the class expects them by default
        at sample_size 128.

        Raises:
            BadInput: it is missing, of another class, or has micro-conditions.
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
        """Noise.

        Raises:
            BadInput: the scheduler has another prediction type.
        """
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
        """Length of the longest prompt."""
        tokenizer = tokenizer_of(folder)
        # The pipeline lowercases and strips before it tokenises.
        lengths = {prompt: len(tokenizer.encode(prompt.lower().strip())) for prompt in prompts}
        return longest(lengths, MAX_TEXT_TOKENS)

    def inputs(
        self, model: Any, latents: Tensor, timestep: float, prompt: Prompt, grid: Grid
    ) -> dict[str, Any]:
        """Arguments of the stock forward; latents [1, C, h, w]."""
        return {
            "hidden_states": latents,
            **prompt,
            "timestep": torch.tensor([timestep]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    def conditioning(self, call: Mapping[str, Any]) -> Conditioning:
        """The tensors of the module's table."""
        return modulated_conditioning(call, self.watched)

    def arguments(self, cond: Mapping[str, Tensor], grid: Grid) -> dict[str, Any]:
        """Text, its mask and the modulation of the blocks."""
        return {name: cond[name] for name in CROSS_ATTENTION}

    def head(self, model: Any, image: Tensor, cond: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """Noise and variance [1, 2 C, h, w]."""
        modulation = model.scale_shift_table[None] + cond["embedded_timestep"][:, None]
        shift, scale = modulation.chunk(2, dim=1)
        image = model.proj_out(model.norm_out(image) * (1 + scale) + shift)
        return unpatchify(image, grid, model.config.patch_size)

    def learned(self, prediction: Tensor) -> Tensor:
        """The noise [1, C, h, w], without the variance."""
        return prediction.chunk(2, dim=1)[0]

    def blank(self, model: Any, grid: Grid, text: int) -> tuple[Tensor, Prompt]:
        """Latents [1, C, h, w] and a prompt of ``text`` tokens."""
        return blank_latents(model.config, grid), blank_caption(model.config, text)

    @torch.no_grad()
    def encode_image(self, vae: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Latents [1, C, h, w]."""
        return vae.encode(pixels).latent_dist.sample(generator) * vae.config.scaling_factor

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: list[str], tokens: int) -> list[Prompt]:
        """Text [1, tokens, D] and mask [1, tokens] of each prompt."""
        encoded = []
        for prompt in prompts:
            embeds, mask, _, _ = pipeline.encode_prompt(
                prompt,
                do_classifier_free_guidance=False,
                device=torch.device("cpu"),
                max_sequence_length=MAX_TEXT_TOKENS,
            )
            encoded.append(masked_prompt(embeds, mask, tokens))
        return encoded

    def sample_options(self, pipeline: Any, pictures: int) -> dict[str, Any]:
        """20 steps at the size that is asked for."""
        return {"num_inference_steps": 20, "use_resolution_binning": False}


FAMILY = PixArt()
