"""Lumina-Image 2.0 (arXiv 2503.21758): Lumina2Transformer2DModel.

One sequence, text first, after refiners of text and image. Positions rotate queries and keys as
complex numbers; an image token's first position is the number of text tokens.

Conditioning (D = width, d = head width, N = image tokens, L = text tokens):

    temb        [1, min(D, 1024)]   embedding of the time
    text_mask   [1, L]              1 for a token, 0 for padding
    rope        [L + N, d]          real and imaginary parts in turn, the same for every draw

diffusers keeps the rotations as float64, a bank as float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edge_dit.contract.objective import FlowMatching
from edge_dit.errors import BadInput
from edge_dit.models.families.family import (
    Conditioning,
    Grid,
    Prompt,
    blank_caption,
    blank_latents,
    longest,
    masked_prompt,
    patchify,
    tokenizer_of,
    unpatchify,
)
from edge_dit.models.families.parts.common import (
    SHIFTED_SWITCHES,
    beyond_positions,
    flow_objective,
)
from edge_dit.models.families.parts.joined import PROMPT_MASK, ROPE, TEXT_MASK, Joined
from edge_dit.models.families.parts.real import interleaved
from edge_dit.models.families.parts.switches import (
    DEEPEST,
    LARGEST,
    WIDEST,
    Misfits,
    Rules,
    axes,
    idle,
    lengths,
    one_of,
    optional,
    positive,
    whole,
)
from edge_dit.models.pipeline import quiet

MAX_TEXT_TOKENS = 256
"""max_sequence_length of Lumina2Pipeline and of diffusers' training script."""
FACTOR = 8
"""Pixels per side of a latent, in Lumina2Pipeline."""


class Lumina2(Joined):
    """Lumina-Image 2.0."""

    name = "lumina2"
    transformer = "Lumina2Transformer2DModel"
    autoencoder = "AutoencoderKL"
    containers: ClassVar[dict[str, str]] = {"layers": "num_layers"}
    drops_padding = True
    head_modules = ("norm_out",)
    # diffusers' train_dreambooth_lora_lumina2.py
    lora_targets = tuple(f"attn.{proj}" for proj in ("to_k", "to_q", "to_v", "to_out.0"))
    per_prompt = (TEXT_MASK, ROPE)
    text_widths: ClassVar[Mapping[str, tuple[str, ...]]] = {"cap_feat_dim": ("text_encoder",)}
    towards_picture = True
    rescales = True
    switches: ClassVar[Rules] = {
        "sample_size": whole(LARGEST),
        "patch_size": one_of(2, why="Lumina2Pipeline rounds sizes to 2 x 2 latents"),
        "in_channels": whole(),
        "out_channels": optional(whole()),
        "hidden_size": whole(),
        "num_layers": whole(DEEPEST),
        "num_refiner_layers": whole(DEEPEST, least=0),
        "num_attention_heads": whole(),
        "num_kv_heads": whole(),
        "multiple_of": whole(),
        "ffn_dim_multiplier": optional(positive()),
        "norm_eps": positive(),
        "scaling_factor": idle(),
        "axes_dim_rope": axes(),
        "axes_lens": lengths(3),
        "cap_feat_dim": whole(),
    }
    vae_switches = SHIFTED_SWITCHES

    def misfits(self, config: Mapping[str, Any]) -> Misfits:
        """Widths that do not add up, and channels that differ between input and output."""
        heads, width = config["num_attention_heads"], config["hidden_size"]
        if width % heads:
            yield "hidden_size", f"a multiple of {heads}, the num_attention_heads"
        if heads % config["num_kv_heads"]:
            yield "num_kv_heads", f"a divisor of {heads}, the num_attention_heads"
        if sum(config["axes_dim_rope"]) * heads != width:
            yield "axes_dim_rope", f"a sum of {width // heads}, the width of a head"
        hidden = 4 * width * (config["ffn_dim_multiplier"] or 1)
        if not 1 <= hidden <= WIDEST**2:
            yield "ffn_dim_multiplier", "a ratio that leaves the feed-forward a width"
        if config["axes_lens"][0] <= MAX_TEXT_TOKENS:
            yield "axes_lens", f"more than {MAX_TEXT_TOKENS} positions of text, the pipeline's most"
        if config["out_channels"] not in (None, config["in_channels"]):
            yield "out_channels", f"{config['in_channels']}, the in_channels, or null"

    def vae_misfits(self, config: Mapping[str, Any]) -> Misfits:
        """Stages that are not the pipeline's."""
        if self.factor(config) != FACTOR:
            yield "block_out_channels", f"4 values: Lumina2Pipeline takes {FACTOR} pixels a latent"

    def grid_faults(
        self, config: Mapping[str, Any], sizes: Mapping[str, int], multiple: int
    ) -> list[BadInput]:
        """Sizes with more tokens a side than the model has positions."""
        return beyond_positions("axes_lens", min(config["axes_lens"][1:]), sizes, multiple)

    def timestep_factor(self, config: Mapping[str, Any]) -> float:
        """The pipeline divides by 1000."""
        return 1 / 1000

    def objective(self, scheduler: Mapping[str, Any]) -> FlowMatching:
        """The velocity, at the scheduler's noise levels, drawn evenly.

        train_dreambooth_lora_lumina2.py takes the table's values as shares of the picture, so that
        it trains mostly at low noise; the pipeline takes them as shares of noise, as here.
        """
        return flow_objective(scheduler)

    def text_tokens(self, folder: Path, prompts: list[str]) -> int:
        """Length of the longest prompt, with the pipeline's system prompt before it."""
        with quiet():
            from diffusers import Lumina2Pipeline
        bare: Any = Lumina2Pipeline(None, None, None, None, None)  # type: ignore[arg-type]
        tokenizer = tokenizer_of(folder)
        before = f"{bare.system_prompt} <Prompt Start> "
        lengths = {prompt: len(tokenizer.encode(before + prompt)) for prompt in prompts}
        return longest(lengths, MAX_TEXT_TOKENS)

    def inputs(
        self, model: Any, latents: Tensor, timestep: float, prompt: Prompt, grid: Grid
    ) -> dict[str, Any]:
        """Arguments of the stock forward; latents [1, C, h, w]."""
        scaled = torch.tensor([timestep * self.timestep_factor(model.config)])
        timed = {"hidden_states": latents, "timestep": self.handed(scaled)}
        # The stock forward counts tokens by the mask.
        return {**timed, **prompt, PROMPT_MASK: prompt[PROMPT_MASK].to(torch.int64)}

    def text_lengths(self, inputs: Mapping[str, Any]) -> list[int]:
        """Numbers of text tokens in the rows of a batch of the stock forward."""
        return inputs[PROMPT_MASK].sum(1).tolist()

    @contextmanager
    def prelude(self, model: Any, inputs: Mapping[str, Any]) -> Iterator[None]:
        """A context in which padding stays in the sequence, between text and image."""
        stock = model.rope_embedder
        model.rope_embedder = _Padded(stock, self.traced)
        try:
            yield
        finally:
            model.rope_embedder = stock

    def conditioning(self, call: Mapping[str, Any]) -> Conditioning:
        """The tensors of the module's table."""
        rope = call["image_rotary_emb"][0]
        rope = rope if self.traced else interleaved(rope)
        return {"temb": call["temb"], TEXT_MASK: call[PROMPT_MASK].float(), ROPE: rope}

    def arguments(self, cond: Mapping[str, Tensor], grid: Grid) -> dict[str, Any]:
        """Temb, the rotations and, if `traceable`, a mask."""
        image = grid[0] * grid[1]
        return {
            "temb": cond["temb"],
            "image_rotary_emb": self.rotations(cond, image).unsqueeze(0),
            "attention_mask": self.sequence_mask(cond, image),
        }

    def head(self, model: Any, image: Tensor, cond: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """Picture minus noise, [1, C, h, w]."""
        return unpatchify(model.norm_out(image, cond["temb"]), grid, model.config.patch_size)

    def blank(self, model: Any, grid: Grid, text: int) -> tuple[Tensor, Prompt]:
        """Latents [1, C, h, w] and a prompt of ``text`` tokens."""
        return blank_latents(model.config, grid), blank_caption(model.config.cap_feat_dim, text)

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: list[str], tokens: int) -> list[Prompt]:
        """Text [1, tokens, D] and mask [1, tokens] of each prompt, after the system prompt."""
        encoded = []
        for prompt in prompts:
            embeds, mask, *_ = pipeline.encode_prompt(
                prompt, False, device=torch.device("cpu"), max_sequence_length=MAX_TEXT_TOKENS
            )
            encoded.append(masked_prompt(embeds, mask, tokens))
        return encoded

    @torch.no_grad()
    def encode_negatives(self, pipeline: Any, prompts: list[str], tokens: int) -> list[Prompt]:
        """The same, without the system prompt."""
        encoded = []
        for prompt in prompts:
            *_, embeds, mask = pipeline.encode_prompt(
                "",
                negative_prompt=prompt,
                device=torch.device("cpu"),
                max_sequence_length=MAX_TEXT_TOKENS,
            )
            encoded.append(masked_prompt(embeds, mask, tokens))
        return encoded

    def sample_options(self, pipeline: Any, pictures: int) -> dict[str, Any]:
        """20 guided steps."""
        return {"num_inference_steps": 20, "guidance_scale": 4.0}


class _Padded(nn.Module):
    """Takes the place of a Lumina2RotaryPosEmbed, for one picture: the same patches and rotations,
    but text has its full length, padding included.

    Args:
        stock: whose tables of rotations are read.
        real: whether rotations are pairs of real numbers.
    """

    def __init__(self, stock: Any, real: bool) -> None:
        super().__init__()
        self.patch, self.real = stock.patch_size, real
        self.tables = [interleaved(one) if real else one for one in stock.freqs_cis]

    def forward(self, latents: Tensor, mask: Tensor) -> tuple[Any, ...]:
        """Patches; rotations of text, image and both; tokens of text and of both."""
        text = mask.shape[1]
        rows, columns = (side // self.patch for side in latents.shape[-2:])
        image = rows * columns
        nowhere = torch.zeros(text, dtype=torch.int64)
        first = torch.cat([torch.arange(text), mask.sum().to(torch.int64).expand(image)])
        row = torch.cat([nowhere, torch.arange(rows).repeat_interleave(columns)])
        column = torch.cat([nowhere, torch.arange(columns).repeat(rows)])
        axes = zip(self.tables, (first, row, column), strict=True)
        rope = torch.cat([table[places] for table, places in axes], dim=1)
        rope = (rope.float() if self.real else rope).unsqueeze(0)
        patches = patchify(latents, self.patch)
        return patches, rope[:, :text], rope[:, text:], rope, [text], [text + image]


FAMILY = Lumina2()
