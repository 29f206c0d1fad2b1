"""Stable Diffusion 3 and 3.5: SD3Transformer2DModel.

Text tokens (77 of CLIP, then those of T5) and image tokens attend jointly. Some blocks of
SD3.5-medium attend over the image a second time (attn2). The last block returns no text. No text is
masked: padding takes part in attention, so text always has its full length.

Conditioning (D = width):

    temb   [1, D]   embedding of timestep and pooled text
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from edge_dit.contract.objective import FlowMatching
from edge_dit.errors import BadInput
from edge_dit.models.families.family import (
    Conditioning,
    Family,
    Grid,
    Prompt,
    blank_latents,
    blank_pooled,
    longest,
    pooled_prompt,
    tokenizer_of,
    unpatchify,
)
from edge_dit.models.families.parts.common import (
    SHIFTED_SWITCHES,
    beyond_positions,
    flow_objective,
    inner_width,
    patch_misfits,
)
from edge_dit.models.families.parts.switches import (
    DEEPEST,
    LARGEST,
    Misfits,
    Rules,
    one_of,
    optional,
    several,
    whole,
)

T5_TOKENS = 77
"""max_sequence_length of diffusers' train_dreambooth_lora_sd3.py."""


class SD3(Family):
    """Stable Diffusion 3 and 3.5."""

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
    placed = ()
    needs = ("text_encoder_2", "tokenizer_2")  # it works without its T5
    text_widths: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "pooled_projection_dim": ("text_encoder", "text_encoder_2"),
        "joint_attention_dim": ("text_encoder_3",),
    }
    switches: ClassVar[Rules] = {
        "sample_size": whole(LARGEST),
        "patch_size": whole(LARGEST),
        "in_channels": whole(),
        "out_channels": optional(whole()),
        "num_layers": whole(DEEPEST),
        "attention_head_dim": whole(),
        "num_attention_heads": whole(),
        "joint_attention_dim": whole(),
        "caption_projection_dim": whole(),
        "pooled_projection_dim": whole(),
        "pos_embed_max_size": whole(LARGEST),
        "dual_attention_layers": several(whole(DEEPEST, least=0)),
        "qk_norm": one_of(
            None,
            "rms_norm",
            "layer_norm",
            "fp32_layer_norm",
            why="SD3's attention runs with no other",
        ),
    }
    vae_switches = SHIFTED_SWITCHES

    def misfits(self, config: Mapping[str, Any]) -> Misfits:
        """Widths that differ between text and image, and channels between input and output."""
        yield from patch_misfits(config, table=True)
        if config["caption_projection_dim"] != inner_width(config):
            expected = f"{inner_width(config)}, num_attention_heads times attention_head_dim"
            yield "caption_projection_dim", expected
        if config["out_channels"] not in (None, config["in_channels"]):
            yield "out_channels", f"{config['in_channels']}, the in_channels, or null"

    def grid_faults(
        self, config: Mapping[str, Any], sizes: Mapping[str, int], multiple: int
    ) -> list[BadInput]:
        """Sizes with more tokens a side than the table of positions has."""
        most = config["pos_embed_max_size"]
        return beyond_positions("pos_embed_max_size", most, sizes, multiple)

    def objective(self, scheduler: Mapping[str, Any]) -> FlowMatching:
        """The velocity. The stock script draws noise levels logit-normally and takes the loss of
        the predicted image (precondition_outputs, after sec. 5 of arXiv 2206.00364).
        """
        return flow_objective(scheduler, logit_normal=True, precondition=True)

    def text_tokens(self, folder: Path, prompts: list[str]) -> int:
        """The full text length, whatever the prompts: padding takes part in attention.

        CLIP may see only the first 77 tokens of a prompt, as in the pipeline, but T5 must see all.
        Without T5 the pipeline passes zeros instead, and CLIP must see all.
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
        """Arguments of the stock forward; latents [1, C, h, w]."""
        return {"hidden_states": latents, **prompt, "timestep": torch.tensor([timestep])}

    def conditioning(self, call: Mapping[str, Any]) -> Conditioning:
        """Temb [1, D]."""
        return {"temb": call["temb"]}

    def arguments(self, cond: Mapping[str, Tensor], grid: Grid) -> dict[str, Any]:
        """Temb [1, D]."""
        return {"temb": cond["temb"]}

    def head(self, model: Any, image: Tensor, cond: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The velocity [1, C, h, w]."""
        image = model.proj_out(model.norm_out(image, cond["temb"]))
        return unpatchify(image, grid, model.config.patch_size)

    def blank(self, model: Any, grid: Grid, text: int) -> tuple[Tensor, Prompt]:
        """Latents [1, C, h, w] and a prompt of ``text`` tokens."""
        return blank_latents(model.config, grid), blank_pooled(model.config, text)

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: list[str], tokens: int) -> list[Prompt]:
        """Text [1, tokens, D] and pooled text [1, P] of each prompt."""
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
            encoded.append(pooled_prompt(embeds, pooled))
        return encoded

    def sample_options(self, pipeline: Any, pictures: int) -> dict[str, Any]:
        """28 steps with as much text as is trained on."""
        return {"num_inference_steps": 28, "max_sequence_length": T5_TOKENS}


FAMILY = SD3()
