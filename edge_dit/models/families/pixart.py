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
from typing import Any, ClassVar

import torch
from torch import Tensor

from edge_dit.contract.objective import EpsilonPrediction
from edge_dit.models.families.family import (
    CROSS_ATTENTION,
    Conditioning,
    Family,
    Grid,
    Prompt,
    blank_caption,
    blank_latents,
    longest,
    masked_prompt,
    modulated_conditioning,
    tokenizer_of,
    unpatchify,
)
from edge_dit.models.families.parts.common import (
    KL_SWITCHES,
    alphas_cumprod,
    caption_misfits,
    patch_misfits,
    scheduler_objective,
)
from edge_dit.models.families.parts.switches import (
    DEEPEST,
    LARGEST,
    MOST_STEPS,
    Misfits,
    Rules,
    flag,
    idle,
    no_dropout,
    one_of,
    optional,
    positive,
    several,
    whole,
)

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
    placed = ()
    # Published checkpoints; diffusers loads them as PixArtTransformer2DModel
    # (models/modeling_utils.py, LegacyModelMixin).
    aliases = ("Transformer2DModel",)
    text_widths: ClassVar[Mapping[str, tuple[str, ...]]] = {"caption_channels": ("text_encoder",)}
    switches: ClassVar[Rules] = {
        "num_attention_heads": whole(),
        "attention_head_dim": whole(),
        "in_channels": whole(),
        "out_channels": whole(),
        "num_layers": whole(DEEPEST),
        "dropout": no_dropout(),
        "norm_num_groups": idle(),
        "cross_attention_dim": whole(),
        "attention_bias": flag(),
        "sample_size": whole(LARGEST),
        "patch_size": whole(LARGEST),
        "activation_fn": one_of("gelu-approximate", why="PixArt-Sigma has no other"),
        "num_embeds_ada_norm": whole(MOST_STEPS),
        "upcast_attention": flag(),
        "norm_type": one_of("ada_norm_single", why="diffusers' PixArt runs with no other"),
        "norm_elementwise_affine": flag(),
        "norm_eps": positive(),
        "interpolation_scale": optional(positive()),
        "use_additional_conditions": one_of(
            False,
            None,
            why="PixArtSigmaPipeline passes no resolution and no aspect ratio; PixArt-Alpha is not "
            "supported",
        ),
        "caption_channels": whole(),
        "attention_type": one_of("default", None, why="PixArtSigmaPipeline passes no boxes"),
    }
    vae_switches = KL_SWITCHES
    scheduler_switches: ClassVar[Rules] = {
        "num_train_timesteps": whole(MOST_STEPS),
        "beta_start": positive(1),
        "beta_end": positive(1),
        "trained_betas": optional(several(positive(1), least=1)),
        "prediction_type": one_of("epsilon", why="PixArt-Sigma predicts noise"),
        "rescale_betas_zero_snr": one_of(False, None, why="its noise levels end below all noise"),
        "use_flow_sigmas": one_of(False, None, why="PixArt-Sigma predicts noise"),
    }
    """Keys of the scheduler's configuration on which the objective depends."""

    def config(self, folder: Path) -> dict[str, Any]:
        """The transformer's configuration.

        Sigma has no micro-conditions: PixArtSigmaPipeline passes none, though the class expects
        them by default at sample_size 128.

        Raises:
            BadInput: it is missing, of another class, or says what is not implemented.
        """
        config = super().config(folder)
        return {**config, "_class_name": self.transformer, "use_additional_conditions": False}

    def misfits(self, config: Mapping[str, Any]) -> Misfits:
        """Widths that do not add up; an output without the variance that `learned` leaves out."""
        yield from patch_misfits(config, table=True)
        yield from caption_misfits(config)
        if config["out_channels"] != 2 * config["in_channels"]:
            yield "out_channels", f"{2 * config['in_channels']}: noise and variance"

    def objective(self, scheduler: Mapping[str, Any]) -> EpsilonPrediction:
        """Noise.

        Raises:
            BadInput: the scheduler is of another prediction type, or of none.
        """
        rules = self.scheduler_switches
        return scheduler_objective(
            scheduler, rules, lambda own: EpsilonPrediction(alphas_cumprod(own))
        )

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
        return blank_latents(model.config, grid), blank_caption(model.config.caption_channels, text)

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
