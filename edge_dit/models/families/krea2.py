"""Krea 2: Krea2Transformer2DModel.

One sequence, text first. A prompt is hidden states of several layers of its encoder for every
token; a fusion before the blocks makes one of them. All blocks share one modulation of the time, to
which each adds a table of its own. Padding is masked.

Conditioning (D = width, d = head width, N = image tokens, L = text tokens):

    temb                     [1, 1, 6 D]   modulation of the blocks
    temb.head                [1, 1, D]     of the head
    encoder_attention_mask   [1, L]        1 for a token, 0 for padding
    rope_cos, rope_sin       [L + N, d]    positions, the same for every draw

The pipeline pads between a prompt and what follows it in the template. Text has no positions, so
here padding comes after both, and only as much as the longest prompt of a job needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from edge_dit.contract.objective import FlowMatching
from edge_dit.models.components import INDEX_FILE, read_json
from edge_dit.models.families.family import (
    Conditioning,
    Grid,
    Prompt,
    longest,
    masked_prompt,
    tokenizer_of,
)
from edge_dit.models.families.parts.common import flow_objective, rotary_misfits
from edge_dit.models.families.parts.joined import PROMPT_MASK, Joined
from edge_dit.models.families.parts.switches import (
    DEEPEST,
    Misfits,
    Rules,
    axes,
    check,
    check_fit,
    one_of,
    optional,
    positive,
    several,
    whole,
)
from edge_dit.models.families.qwen_image import QwenVae
from edge_dit.models.pipeline import quiet

MAX_TEXT_TOKENS = 512
"""max_sequence_length of Krea2Pipeline and of diffusers' training script."""
TAPS = "text_encoder_select_layers"
"""Key of model_index.json: the layers of the text encoder whose states a prompt is."""
PIPELINE_SWITCHES: Rules = {
    TAPS: optional(several(whole(DEEPEST, least=0), least=1)),
    "patch_size": one_of(2, why="latents are packed 2 x 2"),
}
"""Keys of model_index.json that are no components."""


class Krea2(QwenVae, Joined):
    """Krea 2, Raw and Turbo."""

    name = "krea2"
    transformer = "Krea2Transformer2DModel"
    watched = "time_embed"
    head_modules = ("final_layer",)
    # Of those of diffusers' train_dreambooth_lora_krea2.py the ones that are within a block.
    lora_targets = (
        *(f"attn.{proj}" for proj in ("to_q", "to_k", "to_v", "to_out.0", "to_gate")),
        "ff.up",
        "ff.down",
    )
    per_prompt = (PROMPT_MASK, "rope_cos", "rope_sin")
    text_widths: ClassVar[Mapping[str, tuple[str, ...]]] = {"text_hidden_dim": ("text_encoder",)}
    guided_from = 0
    switches: ClassVar[Rules] = {
        "in_channels": whole(),
        "num_layers": whole(DEEPEST),
        "attention_head_dim": whole(),
        "num_attention_heads": whole(),
        "num_key_value_heads": whole(),
        "intermediate_size": whole(),
        "timestep_embed_dim": whole(),
        "text_hidden_dim": whole(),
        "num_text_layers": whole(DEEPEST),
        "text_num_attention_heads": whole(),
        "text_num_key_value_heads": whole(),
        "text_intermediate_size": whole(),
        "num_layerwise_text_blocks": whole(DEEPEST, least=0),
        "num_refiner_text_blocks": whole(DEEPEST, least=0),
        "axes_dims_rope": axes(),
        "rope_theta": positive(),
        "norm_eps": positive(),
    }

    def config(self, folder: Path) -> dict[str, Any]:
        """The transformer's configuration.

        Raises:
            BadInput: it is missing, of another class, or says what is not implemented; or the
                pipeline's own settings do not fit it.
        """
        config = super().config(folder)
        path = folder / INDEX_FILE
        index = read_json(path, "a diffusers pipeline")
        stated = {key: index[key] for key in PIPELINE_SWITCHES if key in index}
        check(path, stated, PIPELINE_SWITCHES, {})
        layers = config["num_text_layers"]
        if stated.get(TAPS) is not None and len(stated[TAPS]) != layers:
            fault = TAPS, f"{layers} values, the num_text_layers"
            check_fit(path, index, iter([fault]))
        return config

    def misfits(self, config: Mapping[str, Any]) -> Misfits:
        """Channels that cannot be packed, and widths that do not add up."""
        if config["in_channels"] % 4:
            yield "in_channels", "a multiple of 4: Krea2Pipeline packs 2 x 2 latents into a token"
        if config["timestep_embed_dim"] % 2:
            yield "timestep_embed_dim", "an even number: half are sines"
        if config["text_hidden_dim"] % config["text_num_attention_heads"]:
            yield "text_hidden_dim", "a multiple of text_num_attention_heads"
        for prefix in ("", "text_"):
            heads = config[f"{prefix}num_attention_heads"]
            if heads % config[f"{prefix}num_key_value_heads"]:
                yield f"{prefix}num_key_value_heads", f"a divisor of {heads}, the heads"
        yield from rotary_misfits(config)

    def timestep_factor(self, config: Mapping[str, Any]) -> float:
        """The pipeline divides by 1000."""
        return 1 / 1000

    def objective(self, scheduler: Mapping[str, Any]) -> FlowMatching:
        """The velocity, noise levels drawn evenly."""
        return flow_objective(scheduler)

    def text_tokens(self, folder: Path, prompts: list[str]) -> int:
        """Length of the longest prompt within the pipeline's template, whose first tokens the
        pipeline drops after it has encoded them.
        """
        with quiet():
            from diffusers import Krea2Pipeline
        bare: Any = Krea2Pipeline(None, None, None, None, None)  # type: ignore[arg-type]
        tokenizer = tokenizer_of(folder)
        before = bare.prompt_template_encode_prefix
        more = bare.prompt_template_encode_num_suffix_tokens - bare.prompt_template_encode_start_idx
        lengths = {prompt: len(tokenizer.encode(before + prompt)) + more for prompt in prompts}
        return longest(lengths, MAX_TEXT_TOKENS)

    def inputs(
        self, model: Any, latents: Tensor, timestep: float, prompt: Prompt, grid: Grid
    ) -> dict[str, Any]:
        """Arguments of the stock forward; latents [1, N, C], packed."""
        rows, columns = grid
        text = prompt["encoder_hidden_states"].shape[1]
        places = torch.zeros(text + rows * columns, 3)
        places[text:, 1] = torch.arange(rows).repeat_interleave(columns)
        places[text:, 2] = torch.arange(columns).repeat(rows)
        return {
            "hidden_states": latents,
            **prompt,
            "timestep": torch.tensor([timestep * self.timestep_factor(model.config)]),
            "position_ids": places,
        }

    def forward(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """The velocity [1, N, C], packed."""
        mask = inputs[PROMPT_MASK] > 0.5  # an additive one, were it not bool
        return super().forward(model, {**inputs, PROMPT_MASK: mask})

    def conditioning(self, call: Mapping[str, Any]) -> Conditioning:
        """The tensors of the module's table."""
        cos, sin = call["image_rotary_emb"]
        return {
            "temb": call["temb"],
            "temb.head": call[self.watched],
            PROMPT_MASK: call[PROMPT_MASK].float(),
            "rope_cos": cos,
            "rope_sin": sin,
        }

    def arguments(self, cond: Mapping[str, Tensor], grid: Grid) -> dict[str, Any]:
        """The modulation, the positions as a pair (cos, sin) and the mask, bool [1, 1, 1, S]."""
        mask = torch.cat([cond[PROMPT_MASK], torch.ones(1, grid[0] * grid[1])], dim=1) > 0.5
        return {
            "temb": cond["temb"],
            "image_rotary_emb": (cond["rope_cos"], cond["rope_sin"]),
            "attention_mask": mask[:, None, None, :],
        }

    def head(self, model: Any, image: Tensor, cond: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The velocity [1, N, C], packed."""
        return model.final_layer(image, cond["temb.head"])

    def blank(self, model: Any, grid: Grid, text: int) -> tuple[Tensor, Prompt]:
        """Latents [1, N, C], packed, and a prompt of ``text`` tokens."""
        config = model.config
        shape = 1, text, config.num_text_layers, config.text_hidden_dim
        prompt = {"encoder_hidden_states": torch.zeros(shape), PROMPT_MASK: torch.ones(1, text)}
        return torch.zeros(1, grid[0] * grid[1], config.in_channels), prompt

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: list[str], tokens: int) -> list[Prompt]:
        """Text [1, tokens, layers, D] and mask [1, tokens] of each prompt; padding is zeros."""
        encoded = []
        for prompt in prompts:
            embeds, mask = pipeline.encode_prompt(
                prompt, device=torch.device("cpu"), max_sequence_length=MAX_TEXT_TOKENS
            )
            text = embeds[mask.bool()]
            missing = max(0, tokens - len(text))
            padded = pad(text, (0, 0, 0, 0, 0, missing)).unsqueeze(0)
            seen = pad(torch.ones(1, len(text)), (0, missing))
            encoded.append(masked_prompt(padded, seen, tokens))
        return encoded

    def as_arguments(self, prompt: Prompt) -> dict[str, Any]:
        """Text, and its mask as bool."""
        mask = prompt[PROMPT_MASK] > 0.5
        return {"prompt_embeds": prompt["encoder_hidden_states"], "prompt_embeds_mask": mask}

    def sample_options(self, pipeline: Any, pictures: int) -> dict[str, Any]:
        """20 guided steps; of Turbo 8 without guidance."""
        if pipeline.config.is_distilled:
            return {"num_inference_steps": 8, "guidance_scale": 0.0}
        return {"num_inference_steps": 20, "guidance_scale": 4.5}


FAMILY = Krea2()
