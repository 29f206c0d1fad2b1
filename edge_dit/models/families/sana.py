"""SANA (arXiv 2410.10629), SANA-1.5 and SANA-Sprint: SanaTransformer2DModel.

One stream of image tokens; text enters by cross-attention (attn2); linear self-attention (attn1);
a convolutional feed-forward that needs the latent's height and width.

Conditioning (D = width, L = text tokens):

    encoder_hidden_states   [1, L, D]   projected and normed caption
    encoder_attention_mask  [1, 1, L]   0 for a token, -10000 for padding
    timestep                [1, 6 D]    modulation of the blocks
    embedded_timestep       [1, D]      modulation of the head

Padding has exactly no weight (exp(-10000) is 0 in float32), so text is cut to the longest prompt of
a job without changing any value.

SANA-Sprint samples along a trigonometric path, but its network predicts the same velocity in the
same x_t (SanaSprintPipeline converts it at every step), so it is tuned by flow matching too; its
timestep is sigma itself and its guidance is an input.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge_dit.models.families.family import (
    Conditioning,
    Family,
    Grid,
    Prompt,
    cut,
    longest,
    tokenizer_of,
    unpatchify,
)
from edge_dit.models.objective import FlowMatching, flow_sigmas
from edge_dit.models.pipeline import quiet

MAX_TEXT_TOKENS = 300
"""SanaPipeline's max_sequence_length."""
SPRINT_GUIDANCE = 4.5
"""SanaSprintPipeline's guidance_scale."""


class Sana(Family):
    """See the module."""

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

    def multiple(self, config: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        """See `Family.multiple`."""
        return 2 ** (len(vae["encoder_block_out_channels"]) - 1) * config["patch_size"]

    def objective(self, scheduler: Mapping[str, Any]) -> FlowMatching:
        """See `Family.objective`."""
        return FlowMatching(flow_sigmas(scheduler))

    def text_tokens(self, folder: Path, prompts: list[str]) -> int:
        """Length of the longest prompt, as `encode_prompts` would mask it.

        The pipeline encodes instruction + prompt, then keeps the first token and the last
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
        """See `Family.inputs`; latents [1, C, h, w]."""
        config = model.config
        if config.guidance_embeds:
            extra = {
                "timestep": torch.tensor([timestep / 1000]),
                "guidance": torch.tensor([SPRINT_GUIDANCE]) * config.guidance_embeds_scale,
            }
        else:
            extra = {"timestep": torch.tensor([timestep * config.timestep_scale])}
        return {"hidden_states": latents, **prompt, **extra}

    def conditioning(self, call: Mapping[str, Any]) -> Conditioning:
        """See `Family.conditioning`."""
        names = ("encoder_hidden_states", "encoder_attention_mask", "timestep")
        return {name: call[name] for name in names} | {"embedded_timestep": call["time_embed"][1]}

    def arguments(self, cond: Mapping[str, Tensor], grid: Grid) -> dict[str, Any]:
        """See `Family.arguments`."""
        names = ("encoder_hidden_states", "encoder_attention_mask", "timestep")
        return {name: cond[name] for name in names} | {"height": grid[0], "width": grid[1]}

    def head(self, model: Any, image: Tensor, cond: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """See `Family.head`; the velocity [1, C, h, w]."""
        image = model.norm_out(image, cond["embedded_timestep"], model.scale_shift_table)
        return unpatchify(model.proj_out(image), grid, model.config.patch_size)

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
        """See `Family.encode_image`; the autoencoder is deterministic."""
        return vae.encode(pixels).latent * vae.config.scaling_factor

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: list[str], tokens: int) -> list[Prompt]:
        """See `Family.encode_prompts`."""
        encoded = []
        for prompt in prompts:
            # SanaSprintPipeline, which knows no negative prompt, returns two values, not four.
            options: dict[str, Any] = (
                {}
                if type(pipeline).__name__ == "SanaSprintPipeline"
                else {"do_classifier_free_guidance": False}
            )
            embeds, mask, *_ = pipeline.encode_prompt(
                prompt,
                device=torch.device("cpu"),
                max_sequence_length=MAX_TEXT_TOKENS,
                complex_human_instruction=instruction(type(pipeline)),
                **options,
            )
            named = {
                "encoder_hidden_states": embeds.float(),
                "encoder_attention_mask": mask.float(),
            }
            encoded.append(cut(named, "encoder_hidden_states", "encoder_attention_mask", tokens))
        return encoded

    def sample(self, pipeline: Any, prompt: str, side: int, seeds: list[int]) -> list[Any]:
        """See `Family.sample`."""
        sprint = type(pipeline).__name__ == "SanaSprintPipeline"
        options = {} if sprint else {"num_inference_steps": 20, "guidance_scale": 2.0}
        return pipeline(
            [prompt] * len(seeds),
            height=side,
            width=side,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            use_resolution_binning=False,
            **options,
        ).images


def instruction(pipeline_class: type) -> list[str]:
    """The complex human instruction that the pipeline puts before every prompt by default."""
    return (
        inspect.signature(pipeline_class.__call__).parameters["complex_human_instruction"].default
    )


FAMILY = Sana()
