"""Chroma (huggingface.co/lodestones/Chroma1-HD): ChromaTransformer2DModel.

FLUX.1's blocks without their modulation layers. One network computes the modulation of all blocks
from the timestep; each block gets rows of its own, by its number in the whole model. The stock
forward joins text and image into one sequence before the single-stream blocks; here both go on
apart, and are joined for each block alone. Text has the pipeline's full length, because the stock
mask is added to the scores, as 1 for tokens (and one padding token) and 0 for the rest: padding
takes part.

Conditioning (D = width, N = image tokens, L = text tokens, d = head width):

    modulation.<block>   [1, 12, D]   of a double-stream block: six rows for the image, six for text
                         [1, 3, D]    of a single-stream block
    modulation.head      [1, 2, D]
    attention_mask       [1, L + N]
    rope_cos, rope_sin   [L + N, d]   positions, the same for every draw
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edge_dit.contract.names import read_by
from edge_dit.contract.objective import FlowMatching
from edge_dit.models.families.family import (
    Call,
    Conditioning,
    Family,
    Grid,
    Prompt,
    State,
    longest,
    tokenizer_of,
)
from edge_dit.models.families.parts import packing
from edge_dit.models.families.parts.common import SHIFTED_SWITCHES, flow_objective
from edge_dit.models.families.parts.switches import Misfits, Rules, axes, whole


class Chroma(Family):
    """Chroma."""

    name = "chroma"
    transformer = "ChromaTransformer2DModel"
    autoencoder = "AutoencoderKL"
    containers = packing.CONTAINERS
    joint = True
    watched = "distilled_guidance_layer"
    by_block = ("modulation",)
    # diffusers has no script for Chroma; its pipeline loads FLUX.1's LoRA.
    lora_targets = packing.LORA_TARGETS
    text_output = packing.TEXT_OUTPUT
    per_prompt = ("attention_mask", "rope_cos", "rope_sin")
    text_widths: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "joint_attention_dim": ("text_encoder",)
    }
    packed = 4
    switches: ClassVar[Rules] = {
        **packing.SWITCHES,
        "axes_dims_rope": axes(),
        "approximator_num_channels": whole(),
        "approximator_hidden_dim": whole(),
        "approximator_layers": whole(),
    }
    vae_switches = SHIFTED_SWITCHES

    def misfits(self, config: Mapping[str, Any]) -> Misfits:
        """As in FLUX.1; and an embedding of the timestep that cannot be cut into its parts."""
        yield from packing.misfits(config)
        if config["approximator_num_channels"] % 4:
            # a quarter each for timestep and guidance, half for the row's number
            yield "approximator_num_channels", "a multiple of 4"

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
        tokenizer = tokenizer_of(folder)
        limit = min(packing.MAX_TEXT_TOKENS, tokenizer.model_max_length)
        longest({prompt: len(tokenizer.encode(prompt)) for prompt in prompts}, limit)
        return limit

    def inputs(
        self, model: Any, latents: Tensor, timestep: float, prompt: Prompt, grid: Grid
    ) -> dict[str, Any]:
        """Arguments of the stock forward; latents [1, N, C], packed."""
        text, mask = prompt["encoder_hidden_states"], prompt["attention_mask"]
        image = torch.ones(1, grid[0] * grid[1], dtype=mask.dtype)
        return {
            "hidden_states": latents,
            "encoder_hidden_states": text,
            "timestep": torch.tensor([timestep * self.timestep_factor(model.config)]),
            "img_ids": packing.places(grid),
            "txt_ids": torch.zeros(text.shape[1], 3),
            "attention_mask": torch.cat([mask, image], dim=1),
        }

    def conditioning(self, call: Call) -> Conditioning:
        """The tensors of the module's table."""
        cos, sin = call["image_rotary_emb"]
        return {
            "modulation": call["temb"],
            "modulation.head": call[self.watched][:, -2:],
            "attention_mask": call["attention_mask"],
            "rope_cos": cos,
            "rope_sin": sin,
        }

    def arguments(self, cond: Mapping[str, Tensor], grid: Grid) -> dict[str, Any]:
        """Modulation, mask and the rotary embedding as a pair (cos, sin)."""
        return {
            "temb": cond["modulation"],
            "image_rotary_emb": (cond["rope_cos"], cond["rope_sin"]),
            "attention_mask": cond["attention_mask"],
        }

    def run_block(
        self, name: str, block: nn.Module, state: State, cond: Mapping[str, Tensor], grid: Grid
    ) -> State:
        """The state after a block; a single-stream block gets one sequence, text first."""
        if name.startswith("transformer_blocks"):
            return super().run_block(name, block, state, cond, grid)
        assert state.text is not None
        sequence = torch.cat([state.text, state.image], dim=1)
        self.image = state.image.shape[1]
        after = block(hidden_states=sequence, **self.arguments(read_by(name, cond), grid))
        count = state.text.shape[1]
        return State(after[:, count:], after[:, :count])

    def head(self, model: Any, image: Tensor, cond: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The velocity [1, N, C], packed."""
        return model.proj_out(model.norm_out(image, cond["modulation.head"]))

    def blank(self, model: Any, grid: Grid, text: int) -> tuple[Tensor, Prompt]:
        """Latents [1, N, C], packed, and a prompt of ``text`` tokens."""
        prompt = {
            "encoder_hidden_states": torch.zeros(1, text, model.config.joint_attention_dim),
            "attention_mask": torch.ones(1, text),
        }
        return packing.blank_latents(model.config, grid), prompt

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: list[str], tokens: int) -> list[Prompt]:
        """Text [1, tokens, D] and mask [1, tokens] of each prompt."""
        encoded = []
        for prompt in prompts:
            embeds, _, mask, *_ = pipeline.encode_prompt(
                prompt,
                device=torch.device("cpu"),
                do_classifier_free_guidance=False,
                max_sequence_length=tokens,
            )
            named = {"encoder_hidden_states": embeds, "attention_mask": mask}
            encoded.append({name: value.float() for name, value in named.items()})
        return encoded

    def sample_options(self, pipeline: Any, pictures: int) -> dict[str, Any]:
        """20 guided steps with the text length of training."""
        limit = min(packing.MAX_TEXT_TOKENS, pipeline.tokenizer.model_max_length)
        return {
            "num_inference_steps": 20,
            "guidance_scale": 4.0,
            "max_sequence_length": limit,
        }


FAMILY = Chroma()
