"""SANA (arXiv 2410.10629), SANA-1.5 and SANA-Sprint: SanaTransformer2DModel.

One stream of image tokens. Self-attention is linear (attn1), text enters by cross-attention
(attn2), and the convolutional feed-forward needs the latent's height and width.

Conditioning (D = width, L = text tokens):

    encoder_hidden_states   [1, L, D]   projected and normed caption
    encoder_attention_mask  [1, 1, L]   0 for a token, -10000 for padding
    timestep                [1, 6 D]    modulation of the blocks
    embedded_timestep       [1, D]      modulation of the head

Padding has a weight of exactly 0 (exp(-10000) is 0 in float32), so cutting text to the longest
prompt of a job changes no value.

SANA-Sprint samples along a trigonometric path. Its network still predicts the same velocity from
the same x_t (SanaSprintPipeline converts it at every step), so it is tuned by flow matching too.
Its timestep is sigma itself, and its guidance is an input.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from edge_dit.contract.objective import FlowMatching
from edge_dit.models.components import INDEX_FILE, read_json
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
    caption_misfits,
    flow_objective,
    patch_misfits,
)
from edge_dit.models.families.parts.surroundings import LinearSurroundings
from edge_dit.models.families.parts.switches import (
    DEEPEST,
    LARGEST,
    WIDEST,
    Misfits,
    Rules,
    check_fit,
    finite,
    flag,
    no_dropout,
    one_of,
    optional,
    positive,
    several,
    whole,
)
from edge_dit.models.pipeline import quiet

MAX_TEXT_TOKENS = 300
"""SanaPipeline's max_sequence_length."""
SPRINT = "SanaSprintPipeline"
SPRINT_GUIDANCE = 4.5
"""SanaSprintPipeline's guidance_scale."""


class Sana(Family):
    """SANA, SANA-1.5 and SANA-Sprint."""

    name = "sana"
    transformer = "SanaTransformer2DModel"
    autoencoder = "AutoencoderDC"
    watched = "time_embed"
    head_modules = ("norm_out", "proj_out", "scale_shift_table")
    # diffusers' train_dreambooth_lora_sana.py, spelled out within a block
    lora_targets = tuple(
        f"{attn}.{proj}" for attn in ("attn1", "attn2") for proj in ("to_q", "to_k", "to_v")
    )
    before_relu = ("attn1.to_q", "attn1.to_k")
    per_prompt = ("encoder_hidden_states", "encoder_attention_mask")
    placed = ()
    surroundings = LinearSurroundings()
    samples_posterior = False
    text_widths: ClassVar[Mapping[str, tuple[str, ...]]] = {"caption_channels": ("text_encoder",)}
    switches: ClassVar[Rules] = {
        "in_channels": whole(),
        "out_channels": whole(),
        "num_attention_heads": whole(),
        "attention_head_dim": whole(),
        "num_layers": whole(DEEPEST),
        "num_cross_attention_heads": whole(),
        "cross_attention_head_dim": whole(),
        "cross_attention_dim": whole(),
        "caption_channels": whole(),
        "mlp_ratio": positive(),
        "dropout": no_dropout(),
        "attention_bias": flag(),
        "sample_size": whole(LARGEST),
        "patch_size": whole(LARGEST),
        "norm_elementwise_affine": flag(),
        "norm_eps": positive(),
        "interpolation_scale": optional(positive()),
        "guidance_embeds": flag(),
        "guidance_embeds_scale": finite(),
        "qk_norm": one_of(
            None,
            "rms_norm_across_heads",
            "layer_norm_across_heads",
            why="SANA's attention runs with no other",
        ),
        "timestep_scale": positive(),
    }
    vae_switches: ClassVar[Rules] = {
        "in_channels": one_of(3, why="pictures have red, green and blue"),
        "latent_channels": whole(),
        "encoder_block_out_channels": several(whole(), least=1),
        "scaling_factor": positive(),
    }

    def config(self, folder: Path) -> dict[str, Any]:
        """The transformer's configuration.

        Raises:
            BadInput: it is missing, of another class, or says what is not implemented; or it is
                SANA-Sprint's and the pipeline is not, or the other way round.
        """
        config = super().config(folder)
        pipeline = read_json(folder / INDEX_FILE, "a diffusers pipeline").get("_class_name")
        if config["guidance_embeds"] != (pipeline == SPRINT):
            wanted = "false" if config["guidance_embeds"] else "true"
            fault = "guidance_embeds", f"{wanted}, by {pipeline} in {INDEX_FILE}"
            check_fit(folder / "transformer" / "config.json", config, iter([fault]))
        return config

    def misfits(self, config: Mapping[str, Any]) -> Misfits:
        """Widths that do not add up, and channels that differ between input and output."""
        yield from patch_misfits(config, table=config["interpolation_scale"] is not None)
        yield from caption_misfits(config)
        hidden = config["mlp_ratio"] * config["num_attention_heads"] * config["attention_head_dim"]
        if not 1 <= hidden <= WIDEST**2:
            yield "mlp_ratio", "a ratio that leaves the feed-forward a width"
        if config["out_channels"] != config["in_channels"]:
            yield "out_channels", f"{config['in_channels']}, the in_channels: a velocity"

    def factor(self, vae: Mapping[str, Any]) -> int:
        """Pixels per side of a latent."""
        return 2 ** (len(vae["encoder_block_out_channels"]) - 1)

    def timestep_factor(self, config: Mapping[str, Any]) -> float:
        """The configuration's own; Sprint's pipeline divides by 1000."""
        return 1 / 1000 if config["guidance_embeds"] else config["timestep_scale"]

    def objective(self, scheduler: Mapping[str, Any]) -> FlowMatching:
        """The velocity, noise levels drawn evenly."""
        return flow_objective(scheduler)

    def text_tokens(self, folder: Path, prompts: list[str]) -> int:
        """Length of the longest prompt.

        The pipeline encodes the instruction and the prompt, then keeps the first token and the last
        `MAX_TEXT_TOKENS` - 1 positions (SanaPipeline.encode_prompt).
        """
        tokenizer = tokenizer_of(folder)
        with quiet():
            from diffusers import SanaPipeline
        prefix = "\n".join(instruction(SanaPipeline))
        prefix_tokens = len(tokenizer.encode(prefix))
        # The pipeline lowercases and strips before it tokenises.
        lengths = {
            prompt: len(tokenizer.encode(prefix + prompt.lower().strip())) - prefix_tokens + 2
            for prompt in prompts
        }
        return longest(lengths, MAX_TEXT_TOKENS)

    def inputs(
        self, model: Any, latents: Tensor, timestep: float, prompt: Prompt, grid: Grid
    ) -> dict[str, Any]:
        """Arguments of the stock forward; latents [1, C, h, w]."""
        config = model.config
        scaled = torch.tensor([timestep * self.timestep_factor(config)])
        extra = {}
        if config.guidance_embeds:
            extra["guidance"] = torch.tensor([SPRINT_GUIDANCE]) * config.guidance_embeds_scale
        return {"hidden_states": latents, **prompt, "timestep": scaled, **extra}

    def conditioning(self, call: Mapping[str, Any]) -> Conditioning:
        """The tensors of the module's table."""
        return modulated_conditioning(call, self.watched)

    def arguments(self, cond: Mapping[str, Tensor], grid: Grid) -> dict[str, Any]:
        """Text, its mask, the modulation of the blocks, and the token grid."""
        named = {name: cond[name] for name in CROSS_ATTENTION}
        return {**named, "height": grid[0], "width": grid[1]}

    def head(self, model: Any, image: Tensor, cond: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The velocity [1, C, h, w]."""
        image = model.norm_out(image, cond["embedded_timestep"], model.scale_shift_table)
        return unpatchify(model.proj_out(image), grid, model.config.patch_size)

    def blank(self, model: Any, grid: Grid, text: int) -> tuple[Tensor, Prompt]:
        """Latents [1, C, h, w] and a prompt of ``text`` tokens."""
        return blank_latents(model.config, grid), blank_caption(model.config.caption_channels, text)

    def moments(self, vae: Any, pixels: Tensor) -> tuple[Tensor, None]:
        """Latents [1, C, h, w]; the autoencoder is deterministic."""
        return vae.encode(pixels).latent, None

    def encode_prompts(self, pipeline: Any, prompts: list[str], tokens: int) -> list[Prompt]:
        """Text [1, tokens, D] and mask [1, tokens] of each prompt."""
        return self._encoded(pipeline, prompts, tokens, instruction(type(pipeline)))

    def encode_negatives(self, pipeline: Any, prompts: list[str], tokens: int) -> list[Prompt]:
        """The same, without the instruction."""
        return self._encoded(pipeline, prompts, tokens, None)

    @torch.no_grad()
    def _encoded(
        self, pipeline: Any, prompts: list[str], tokens: int, told: list[str] | None
    ) -> list[Prompt]:
        # SanaSprintPipeline has no negative prompt and returns two values, not four.
        options = {} if is_sprint(pipeline) else {"do_classifier_free_guidance": False}
        encoded = []
        for prompt in prompts:
            embeds, mask, *_ = pipeline.encode_prompt(
                prompt,
                device=torch.device("cpu"),
                max_sequence_length=MAX_TEXT_TOKENS,
                complex_human_instruction=told,
                **options,
            )
            encoded.append(masked_prompt(embeds, mask, tokens))
        return encoded

    def cannot_paint(self, pipeline: Any) -> str:
        """SANA-Sprint's steps are random."""
        return "SANA-Sprint draws new noise in every step" if is_sprint(pipeline) else ""

    def sample_options(self, pipeline: Any, pictures: int) -> dict[str, Any]:
        """20 guided steps at the size that is asked for; Sprint's own few steps for Sprint."""
        options = {} if is_sprint(pipeline) else {"num_inference_steps": 20, "guidance_scale": 2.0}
        return {"use_resolution_binning": False, **options}


def is_sprint(pipeline: Any) -> bool:
    """Whether a pipeline is SANA-Sprint's."""
    return type(pipeline).__name__ == SPRINT


def instruction(pipeline_class: type) -> list[str]:
    """The complex human instruction that the pipeline puts before every prompt by default."""
    return (
        inspect.signature(pipeline_class.__call__).parameters["complex_human_instruction"].default
    )


FAMILY = Sana()
