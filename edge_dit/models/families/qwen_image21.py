"""Qwen-Image 2.1: QwenImage21Transformer2DModel.

One sequence, text first. Attention is causal over the text, and every image token sees all. All
blocks share one modulation of the time; text is modulated as at timestep 0, so that its states
depend on the prompt alone. An image token's first position is the number of text tokens, its others
are rows and columns from the middle of the picture.

Conditioning (D = width, d = head width, N = image tokens, L = text tokens):

    modulation   [2, 4 D]      of the time, and of timestep 0; without causal_condition [1, 4 D]
    temb.head    [2, D]        embeddings of the two; [1, D]
    text_mask    [1, L]        1 for a token, 0 for padding
    rope         [L + N, d]    real and imaginary parts in turn, the same for every draw

A prompt alone has no padding in the pipeline. In a batch it has, and then the picture begins after
the padding: another position than with the same prompt alone. Here it never does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from edge_dit.contract.objective import FlowMatching
from edge_dit.models.families.family import Conditioning, Grid, Prompt, State, cut, longest
from edge_dit.models.families.parts.common import flow_objective, rotary_misfits
from edge_dit.models.families.parts.joined import ROPE, TEXT_MASK, Joined
from edge_dit.models.families.parts.real import interleaved
from edge_dit.models.families.parts.switches import (
    DEEPEST,
    Misfits,
    Rules,
    axes,
    flag,
    one_of,
    optional,
    positive,
    whole,
)
from edge_dit.models.families.qwen_image import QwenVae
from edge_dit.models.pipeline import processor_of, quiet

TEXT, MASK = "encoder_hidden_states", "encoder_hidden_states_mask"
MOST_TEXT_TOKENS = 8191
"""Positions of the rotary tables before that of the picture. The pipeline cuts nothing off."""
FACTOR = 16
"""Pixels per side of a latent, in QwenImage21Pipeline."""
SLOT = 4
"""Image tokens in a row for each of `img_mask`'s."""


class QwenImage21(QwenVae, Joined):
    """Qwen-Image 2.1."""

    name = "qwen_image21"
    transformer = "QwenImage21Transformer2DModel"
    autoencoder = "AutoencoderKLQwenImage21"
    tokenizer = "processor"
    drops_padding = True
    token_step = 2
    packed = 1
    watched = "time_text_embed"
    # diffusers has no script for it: those of train_dreambooth_lora_qwen_image.py
    lora_targets = tuple(f"attn.{proj}" for proj in ("to_q", "to_k", "to_v", "to_out.0"))
    per_prompt = (TEXT_MASK, ROPE)
    text_widths: ClassVar[Mapping[str, tuple[str, ...]]] = {"context_in_dim": ("text_encoder",)}
    guided_by = ""  # distilled: the pipeline guides only if it is told to
    switches: ClassVar[Rules] = {
        "patch_size": one_of(1, why="QwenImage21Pipeline makes a token of each latent"),
        "in_channels": whole(),
        "out_channels": optional(whole()),
        "num_layers": whole(DEEPEST),
        "attention_head_dim": whole(),
        "num_attention_heads": whole(),
        "context_in_dim": whole(),
        "mlp_ratio": whole(),
        "axes_dims_rope": axes(),
        "eps": positive(),
        "causal_condition": flag(),
    }
    vae_switches: ClassVar[Rules] = {
        **{key: rule for key, rule in QwenVae.vae_switches.items() if key != "input_channels"},
        "in_channels": one_of(4, why="pictures have red, green, blue and alpha"),
        "out_channels": one_of(4, why="pictures have red, green, blue and alpha"),
        "patch_size": one_of(None, 1, why="QwenImage21Pipeline takes 16 pixels a latent"),
    }

    def misfits(self, config: Mapping[str, Any]) -> Misfits:
        """Channels that differ between input and output, and widths that do not add up."""
        if config["out_channels"] not in (None, config["in_channels"]):
            yield "out_channels", f"{config['in_channels']}, the in_channels, or null"
        yield from rotary_misfits(config)

    def vae_misfits(self, config: Mapping[str, Any]) -> Misfits:
        """Stages that are not the pipeline's."""
        yield from super().vae_misfits(config)
        if self.factor(config) != FACTOR:
            yield (
                "temperal_downsample",
                f"4 values: QwenImage21Pipeline takes {FACTOR} pixels a latent",
            )

    def multiple(self, config: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        """Pixels per side of a token, which is one latent."""
        return self.factor(vae)

    def timestep_factor(self, config: Mapping[str, Any]) -> float:
        """The pipeline divides by 1000."""
        return 1 / 1000

    def objective(self, scheduler: Mapping[str, Any]) -> FlowMatching:
        """The velocity, noise levels drawn evenly."""
        return flow_objective(scheduler)

    def text_tokens(self, folder: Path, prompts: list[str]) -> int:
        """Length of the longest prompt within the pipeline's template, whose system message the
        pipeline drops after it has encoded it.
        """
        with quiet():
            from diffusers import QwenImage21Pipeline
        bare: Any = QwenImage21Pipeline(None, None, None, processor_of(folder), None)  # type: ignore[arg-type]
        encode = bare.processor.tokenizer.encode
        lengths = {
            prompt: len(encode(bare.prompt_template_t2i.format(prompt or " "))) - bare._drop_idx
            for prompt in prompts
        }
        return longest(lengths, MOST_TEXT_TOKENS)

    # ---------------------------------------------------------------- transformer

    def inputs(
        self, model: Any, latents: Tensor, timestep: float, prompt: Prompt, grid: Grid
    ) -> dict[str, Any]:
        """Arguments of `forward`; latents [1, C, h, w]."""
        text, slots = prompt[TEXT].shape[1], grid[0] * grid[1] // SLOT
        return {
            "hidden_states": latents.flatten(2).transpose(1, 2),
            **prompt,
            "timestep": torch.tensor([timestep * self.timestep_factor(model.config)]),
            "img_shapes": [[(1, *grid)]],
            "img_mask": pad(torch.zeros(1, text), (0, slots), value=1.0) > 0.5,
        }

    def forward(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """The velocity [1, C, h, w], of a prompt without its padding."""
        padded, used = inputs[TEXT].shape[1], _used(inputs[MASK])
        mask = inputs[MASK][:, :used] > 0.5  # padding of the shorter prompts of a batch is left
        given = {
            **inputs,
            TEXT: inputs[TEXT][:, :used],
            MASK: None if mask.all() else mask,
            "img_mask": inputs["img_mask"][:, padded - used :],
        }
        found = model(**given, return_dict=False)[0][:, used:]
        return found.transpose(1, 2).unflatten(-1, inputs["img_shapes"][0][-1][1:])

    @torch.no_grad()
    def begin(self, model: Any, inputs: Mapping[str, Any]) -> tuple[State, Conditioning]:
        """The state that enters the first block, and conditioning.

        The stock forward computes the sequence's layout from the values of its masks, which a trace
        does not have. `traceable`, its modules are called one by one.
        """
        if not self.traced:
            return super().begin(model, inputs)
        image = model.img_in(inputs["hidden_states"])
        causal = model.config.causal_condition
        time = pad(inputs["timestep"], (0, 1)) if causal else inputs["timestep"]
        temb = model.time_text_embed(time, image)
        cond = {
            "modulation": model.modulation(temb),
            "temb.head": temb,
            TEXT_MASK: inputs[MASK],
            ROPE: self._rope(model, inputs),
        }
        return self._padded(image, model.txt_in(inputs[TEXT]), cond), cond

    def _rope(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """`ROPE` of a prompt with padding, computed as QwenImage21Rope does."""
        mask, (rows, columns) = inputs[MASK], inputs["img_shapes"][0][-1][1:]
        text, tables = mask.shape[1], [interleaved(table) for table in model.pos_embed.freqs]
        first = mask.sum(1).to(torch.int64).expand(rows * columns)
        row = (torch.arange(rows) - (rows - rows // 2)).repeat_interleave(columns)
        column = (torch.arange(columns) - (columns - columns // 2)).repeat(rows)
        places = (first, row % len(tables[1]), column % len(tables[2]))
        before = torch.cat([table[:text] for table in tables], dim=1) * mask.transpose(0, 1)
        tables[0] = tables[0][: text + 1]
        ours = [table[place] for table, place in zip(tables, places, strict=True)]
        return self.join(torch.cat(ours, dim=1), before)

    def conditioning(self, call: Mapping[str, Any]) -> Conditioning:
        """The tensors of the module's table."""
        mask, rope = call[MASK], interleaved(call["rotary_emb"])
        image, text = self.part(rope, len(rope) - _used(mask))
        return {
            "modulation": call["modulation"],
            "temb.head": call[self.watched],
            TEXT_MASK: mask.float(),
            ROPE: self.join(image, pad(text, (0, 0, 0, mask.shape[1] - len(text)))),
        }

    def arguments(self, cond: Mapping[str, Tensor], grid: Grid) -> dict[str, Any]:
        """The modulation and whose rows are the picture's, the rotations, where the text is, and if
        `traceable` a mask of padding.
        """
        image = grid[0] * grid[1]
        text = self.seen(cond) or cond[TEXT_MASK].shape[1]
        return {
            "modulation": cond["modulation"],
            "target_token_mask": _timed(cond["modulation"], text, image),
            "rotary_emb": self.rotations(cond, image),
            "segments": [(0, text, True)],
            "key_valid": self.sequence_mask(cond, image),
        }

    def head(self, model: Any, image: Tensor, cond: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The velocity [1, C, h, w]."""
        temb = cond["temb.head"]
        found = model.proj_out(model.norm_out(image, temb, _timed(temb, 0, image.shape[1])))
        return found.transpose(1, 2).unflatten(-1, grid)

    def blank(self, model: Any, grid: Grid, text: int) -> tuple[Tensor, Prompt]:
        """Latents [1, C, h, w] and a prompt of ``text`` tokens."""
        config = model.config
        prompt = {TEXT: torch.zeros(1, text, config.context_in_dim), MASK: torch.ones(1, text)}
        return torch.zeros(1, config.in_channels, *grid), prompt

    # ---------------------------------------------------------------- pipeline

    def moments(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation [1, C, h, w] of an opaque picture."""
        return super().moments(vae, torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1))

    def pixels(self, vae: Any, raw: Tensor) -> Tensor:
        """The picture [1, 3, H, W] without its alpha."""
        return super().pixels(vae, raw)[:, :3]

    def pipeline_latents(self, latents: Tensor, rows: int) -> Tensor:
        """Tokens [B, N, C]."""
        return latents.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: list[str], tokens: int) -> list[Prompt]:
        """Text [1, tokens, D] and mask [1, tokens] of each prompt; padding is zeros."""
        encoded = []
        for prompt in prompts:
            text, *_ = pipeline.encode_prompt(prompt, device=torch.device("cpu"))
            missing = max(0, tokens - text.shape[1])
            padded = pad(text.float(), (0, 0, 0, missing))
            mask = pad(torch.ones(1, text.shape[1]), (0, missing))
            encoded.append(cut({TEXT: padded, MASK: mask}, TEXT, MASK, tokens))
        return encoded

    def as_arguments(self, prompt: Prompt) -> dict[str, Any]:
        """The tokens that are there."""
        return {"prompt_embeds": prompt[TEXT][:, : _used(prompt[MASK])]}

    def sample_options(self, pipeline: Any, pictures: int) -> dict[str, Any]:
        """20 steps without guidance, as it was distilled; every step runs the whole sequence."""
        return {"num_inference_steps": 20, "use_kv_cache": False}

    def sample(self, pipeline: Any, prompt: str, side: int, seeds: list[int]) -> list[Any]:
        """Square pictures (PIL) of a prompt without their alpha, one per seed."""
        return [one.convert("RGB") for one in super().sample(pipeline, prompt, side, seeds)]


def _used(mask: Tensor) -> int:
    """Tokens of the longest prompt in a batch.

    Args:
        mask: [B, L], 1 for a token, 0 for padding after it.
    """
    return int(mask.sum(1).max())


def _timed(rows: Tensor, text: int, image: int) -> Tensor | None:
    """Which tokens of a sequence are modulated by the time, bool [S]; None if all are.

    Args:
        rows: [2, ...] of the time and of timestep 0, or [1, ...].
        text, image: numbers of tokens.
    """
    return pad(torch.ones(image), (text, 0)) > 0.5 if len(rows) == 2 else None


FAMILY = QwenImage21()
