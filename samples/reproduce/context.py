"""What a part of a picture's tokens misses of the rest, and how trained blocks hear it.

A block of SANA that sees a window of a picture's tokens lacks two things of the others. Its linear
attention sums relu(k)^T [v, 1] over all tokens (diffusers' SanaLinearAttnProcessor2_0): the tokens
around the window have a sum too, heads x (d + 1) x d numbers however many they are. And the 3 x 3
depthwise convolution of its feed-forward reads one token beyond the window: a ring. Both are the
base model's, computed once where whole pictures pass its blocks; LoRA's part in them is left out.

A block of FLUX that sees one token of each cell of a picture hears the others through it: as often
as the cell has tokens, if its logits are raised by the logarithm of that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from edge_dit.contract.bank import Crop
from edge_dit.models.families.family import Grid


@dataclass(frozen=True)
class Heard:
    """Of one block, for one window or, joined, for a batch of them.

    Attributes:
        sums: of attention over the tokens outside, [B, heads, d + 1, d].
        ring: what the convolution reads around the window, zeros within it and beyond the picture,
            [B, C, side + 2, side + 2] float16.
    """

    sums: Tensor
    ring: Tensor


def heard_by(block: Any, seen: dict[str, Tensor], place: Crop, grid: Grid, row: int) -> Heard:
    """Of one picture of a batch that passed a block.

    Args:
        block: a SanaTransformerBlock.
        seen: from `listening`.
        place: of the window, in tokens.
        grid: token rows and columns of the picture.
        row: number of the picture.
    """
    rows, columns = (slice(start, start + place.side) for start in (place.top, place.left))
    outside = torch.ones(grid, dtype=torch.bool)
    outside[rows, columns] = False
    heads = block.attn1.heads
    key, value = (seen[n][row, outside.flatten()].unflatten(-1, (heads, -1)) for n in ("k", "v"))
    sums = torch.einsum("nhe,nhd->hed", F.pad(value, (0, 1), value=1.0), F.relu(key))
    high, wide = (slice(start, start + place.side + 2) for start in (place.top, place.left))
    ring = F.pad(seen["ring"][row], (1, 1, 1, 1))[:, high, wide].half()
    ring[:, 1:-1, 1:-1] = 0
    return Heard(sums[None], ring[None])


@contextmanager
def listening(block: Any) -> Iterator[dict[str, Tensor]]:
    """Keys and values of a block's attention, [B, N, D], and what its convolution reads,
    [B, C, h, w], by "k", "v" and "ring", after each time that it has run.
    """
    seen: dict[str, Tensor] = {}
    attention = block.attn1

    def output_to(name: str) -> Any:
        return lambda _module, _inputs, output: seen.__setitem__(name, output)

    hooks = [
        (attention.norm_k or attention.to_k).register_forward_hook(output_to("k")),
        attention.to_v.register_forward_hook(output_to("v")),
        block.ff.conv_depth.register_forward_pre_hook(
            lambda _module, inputs: seen.__setitem__("ring", inputs[0])
        ),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class _Attention:
    """SANA's linear attention, with the sums of tokens that are not there added."""

    sums: Tensor

    def __call__(self, attention: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        query, key = attention.to_q(hidden_states), attention.to_k(hidden_states)
        if attention.norm_q is not None:
            query, key = attention.norm_q(query), attention.norm_k(key)
        value = attention.to_v(hidden_states)
        query, key, value = (
            x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (query, key, value)
        )
        sums = F.pad(value, (0, 1), value=1.0).transpose(2, 3) @ F.relu(key) + self.sums
        found = F.relu(query) @ sums.transpose(2, 3)
        mean = found[..., :-1] / (found[..., -1:] + 1e-15)
        return attention.to_out[1](attention.to_out[0](mean.transpose(1, 2).flatten(2)))


class _Convolution(nn.Module):
    """A depthwise convolution that reads a ring around its input."""

    ring: Tensor

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        around = F.pad(x, (1, 1, 1, 1)) + self.ring
        return F.conv2d(around, self.base.weight, self.base.bias, groups=self.base.groups)


@contextmanager
def hearing(
    blocks: Sequence[Any], attention_too: bool
) -> Iterator[list[tuple[_Attention, _Convolution]]]:
    """Let blocks' convolutions hear what `set_heard` says, and their attention if that is to, until
    the end.
    """
    before = [(block.attn1.processor, block.ff.conv_depth) for block in blocks]
    made = [(_Attention(), _Convolution(convolution)) for _, convolution in before]
    try:
        for block, (attention, convolution) in zip(blocks, made, strict=True):
            block.ff.conv_depth = convolution
            if attention_too:
                block.attn1.processor = attention
        yield made
    finally:
        for block, (attention, convolution) in zip(blocks, before, strict=True):
            block.attn1.processor, block.ff.conv_depth = attention, convolution


def set_heard(
    ears: list[tuple[_Attention, _Convolution]], heard: Sequence[Sequence[Heard]]
) -> None:
    """What the blocks hear from now on.

    Args:
        ears: from `hearing`.
        heard: of each row of the batch, for each block.
    """
    for (attention, convolution), rows in zip(ears, zip(*heard, strict=True), strict=True):
        attention.sums = torch.cat([row.sums for row in rows])
        convolution.ring = torch.cat([row.ring for row in rows]).float()


class _Counted(FluxAttnProcessor):
    """FLUX's attention, in which image tokens count several times.

    Args:
        tokens: of the image, behind the text's.
        times: how often each counts.
    """

    def __init__(self, tokens: int, times: float) -> None:
        super().__init__()
        self.tokens, self.raised = tokens, math.log(times)

    def __call__(
        self, attn: Any, image: Tensor, text: Tensor | None, mask: None, rotary: Any
    ) -> Any:
        mask = torch.zeros(1, 1, 1, rotary[0].shape[0])
        mask[..., -self.tokens :] = self.raised
        return super().__call__(attn, image, text, mask, rotary)


@contextmanager
def counting(blocks: Sequence[Any], tokens: int, times: float) -> Iterator[None]:
    """Let image tokens count several times in FLUX's blocks, until the end.

    Args:
        blocks: which.
        tokens: of the image.
        times: how often each counts.
    """
    before = [block.attn.processor for block in blocks]
    try:
        for block in blocks:
            block.attn.processor = _Counted(tokens, times)
        yield
    finally:
        for block, processor in zip(blocks, before, strict=True):
            block.attn.processor = processor
