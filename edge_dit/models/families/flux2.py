"""FLUX.2 klein, base and distilled: Flux2Transformer2DModel.

Double-stream blocks, then single-stream ones, all with joint attention. All blocks of a kind share
one modulation of the timestep. The stock forward joins text and image before the single-stream
blocks; a block called with both joins them itself, and gives them back apart when told to. klein
masks no text: padding takes part in attention, so text always has the pipeline's full length.

The autoencoder's latents are packed 2 x 2 first and normalised after, by the running statistics of
a batch norm that are among its weights.

Conditioning (D = width, S = text and image tokens together, d = head width):

    temb_mod_img.transformer_blocks     [1, 6D]   shift, scale and gate, of attention and MLP
    temb_mod_txt.transformer_blocks     [1, 6D]
    temb_mod.single_transformer_blocks  [1, 3D]
    temb.head                           [1, D]    embedding of the timestep
    rope_cos, rope_sin                  [S, d]    positions, the same for every draw
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from edge_dit.contract.loop import Latents
from edge_dit.contract.objective import FlowMatching
from edge_dit.models.families.family import (
    Call,
    Conditioning,
    Family,
    Grid,
    Prompt,
    longest,
    tokenizer_of,
)
from edge_dit.models.families.parts import packing
from edge_dit.models.families.parts.common import flow_objective
from edge_dit.models.families.parts.switches import (
    Misfits,
    Rules,
    axes,
    flag,
    one_of,
    positive,
    several,
    whole,
)

BASE_STEPS, DISTILLED_STEPS = 20, 4
"""Steps of sample pictures; the distilled checkpoints are made for four."""
GUIDANCE = 4.0
"""Default of Flux2KleinPipeline."""
ENCODER_LAYERS = (9, 18, 27)
"""Layers of the text encoder whose outputs, side by side, are the text (the pipeline's default)."""


class Flux2(Family):
    """FLUX.2 klein."""

    name = "flux2"
    transformer = "Flux2Transformer2DModel"
    autoencoder = "AutoencoderKLFlux2"
    containers = packing.CONTAINERS
    joint = True
    watched = "time_guidance_embed"
    by_list = ("temb_mod_img", "temb_mod_txt", "temb_mod")
    # diffusers' train_dreambooth_lora_flux2_klein.py; the last two are of single blocks
    lora_targets = (
        *(f"attn.{proj}" for proj in ("to_q", "to_k", "to_v", "to_out.0")),
        "attn.to_qkv_mlp_proj",
        "attn.to_out",
    )
    text_output = (
        "attn.add_q_proj",
        "attn.to_add_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
    )
    per_prompt = ("rope_cos", "rope_sin")
    text_widths: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "joint_attention_dim": ("text_encoder",) * len(ENCODER_LAYERS)
    }
    packed = 4
    samples_posterior = False
    switches: ClassVar[Rules] = {
        **packing.SWITCHES,
        "timestep_guidance_channels": whole(),
        "mlp_ratio": positive(),
        "axes_dims_rope": axes(4),
        "rope_theta": positive(),
        "eps": positive(),
        "guidance_embeds": flag(),  # Flux2KleinPipeline passes no guidance either way
    }
    vae_switches: ClassVar[Rules] = {
        "in_channels": one_of(3, why="pictures have red, green and blue"),
        "out_channels": one_of(3, why="pictures have red, green and blue"),
        "latent_channels": whole(),
        "block_out_channels": several(whole(), least=1),
        "batch_norm_eps": positive(),
        "patch_size": one_of([2, 2], why="Flux2KleinPipeline packs 2 x 2 latents into a token"),
    }

    def misfits(self, config: Mapping[str, Any]) -> Misfits:
        """As in FLUX.1; and an MLP without features."""
        yield from packing.misfits(config)
        width = config["num_attention_heads"] * config["attention_head_dim"]
        if int(width * config["mlp_ratio"]) < 1:
            yield "mlp_ratio", f"at least 1 / {width}"

    def multiple(self, config: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        """Pixels per side of a token; the pipeline packs 2 x 2 latents into one."""
        return self.factor(vae) * 2

    def latents(self, vae: Any) -> Latents:
        """Each channel of a token by the batch norm's statistics."""
        deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        return Latents(
            shift=vae.bn.running_mean.tolist(),
            scale=(1 / deviation.double()).tolist(),
            packed=True,
            of_tokens=True,
            factor=self.factor(vae.config),
            samples=False,
        )

    def timestep_factor(self, config: Mapping[str, Any]) -> float:
        """The pipeline divides by 1000."""
        return 1 / 1000

    def objective(self, scheduler: Mapping[str, Any]) -> FlowMatching:
        """The velocity, noise levels drawn evenly."""
        return flow_objective(scheduler)

    def text_tokens(self, folder: Path, prompts: list[str]) -> int:
        """The full text length, whatever the prompts: padding takes part in attention."""
        tokenizer = tokenizer_of(folder)
        limit = min(packing.MAX_TEXT_TOKENS, tokenizer.model_max_length)
        lengths = {prompt: len(tokenizer(_chat(tokenizer, prompt)).input_ids) for prompt in prompts}
        longest(lengths, limit)
        return limit

    def inputs(
        self, model: Any, latents: Tensor, timestep: float, prompt: Prompt, grid: Grid
    ) -> dict[str, Any]:
        """Arguments of the stock forward; latents [1, N, C], packed."""
        text = prompt["encoder_hidden_states"].shape[1]
        image = packing.places(grid)
        image_ids = torch.cat([image, torch.zeros(len(image), 1)], dim=1)
        text_ids = torch.cat([torch.zeros(text, 3), torch.arange(text)[:, None]], dim=1)
        return {
            "hidden_states": latents,
            **prompt,
            "timestep": torch.tensor([timestep * self.timestep_factor(model.config)]),
            # the fourth number is the place in the text
            "img_ids": image_ids[None],
            "txt_ids": text_ids[None],
        }

    def conditioning(self, call: Call) -> Conditioning:
        """The tensors of the module's table."""
        cos, sin = call["image_rotary_emb"]
        named = {name: call[name] for name in self.by_list if name in call}
        return {**named, "temb.head": call[self.watched], "rope_cos": cos, "rope_sin": sin}

    def arguments(self, cond: Mapping[str, Tensor], grid: Grid) -> dict[str, Any]:
        """Modulation and the rotary embedding as a pair (cos, sin)."""
        named: dict[str, Any] = {name: cond[name] for name in self.by_list if name in cond}
        named["image_rotary_emb"] = (cond["rope_cos"], cond["rope_sin"])
        if "temb_mod" in cond:
            named["split_hidden_states"] = True
        return named

    def head(self, model: Any, image: Tensor, cond: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The velocity [1, N, C], packed."""
        return model.proj_out(model.norm_out(image, cond["temb.head"]))

    def blank(self, model: Any, grid: Grid, text: int) -> tuple[Tensor, Prompt]:
        """Latents [1, N, C], packed, and a prompt of ``text`` tokens."""
        embeds = torch.zeros(1, text, model.config.joint_attention_dim)
        return packing.blank_latents(model.config, grid), {"encoder_hidden_states": embeds}

    def moments(self, vae: Any, pixels: Tensor) -> tuple[Tensor, None]:
        """The mode; diffusers' training script and pipeline take no sample."""
        return vae.encode(pixels).latent_dist.mode(), None

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: list[str], tokens: int) -> list[Prompt]:
        """Text [1, tokens, 3 D] of each prompt."""
        encoded = []
        for prompt in prompts:
            embeds, _ = pipeline.encode_prompt(
                prompt, device=torch.device("cpu"), max_sequence_length=tokens
            )
            encoded.append({"encoder_hidden_states": embeds.float()})
        return encoded

    def pipeline_latents(self, latents: Tensor, rows: int) -> Tensor:
        """[B, 4 C, rows, columns]: the pipeline takes a picture of tokens."""
        return latents.transpose(1, 2).unflatten(2, (rows, -1))

    def guides(self, pipeline: Any) -> bool:
        """Not if it is distilled: its pipeline then ignores guidance_scale."""
        return not pipeline.config.is_distilled

    def sample_options(self, pipeline: Any, pictures: int) -> dict[str, Any]:
        """Guided steps, or few without guidance, with the text length of training."""
        guided, limit = self.guides(pipeline), pipeline.tokenizer.model_max_length
        return {
            "num_inference_steps": BASE_STEPS if guided else DISTILLED_STEPS,
            "guidance_scale": GUIDANCE if guided else 1.0,
            "max_sequence_length": min(packing.MAX_TEXT_TOKENS, limit),
        }


def _chat(tokenizer: Any, prompt: str) -> str:
    """A prompt as Flux2KleinPipeline puts it to its text encoder."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )


FAMILY = Flux2()
