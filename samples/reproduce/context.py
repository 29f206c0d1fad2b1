"""What a part of a picture's tokens misses of the rest, and how trained blocks hear it.

A block of SANA that sees a window of a picture's tokens lacks two things of the others. Its linear
attention sums relu(k)^T [v, 1] over all tokens (diffusers' SanaLinearAttnProcessor2_0): the tokens
around the window have a sum too, heads x (d + 1) x d numbers however many they are. And the 3 x 3
depthwise convolution of its feed-forward reads one token beyond the window: a ring.

A block of FLUX lacks the keys and values of the others, two times the width for each of them, or
for each cell of four: their means, counted four times.

All are the base model's, computed once where whole pictures pass its blocks; LoRA's part in them is
left out.

A block of FLUX that sees one token of each cell of a picture hears the others through it: as often
as the cell has tokens, if its logits are raised by the logarithm of that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from edge_dit.contract.bank import Crop
from edge_dit.models.families.family import Grid

Heard = tuple[Tensor, ...]
"""Of one block, for one window: what its `Ear` hears, each [1, ...]."""
Seen = dict[str, Tensor]
"""What `listening` left of a block that ran on a batch of whole pictures."""


@dataclass(frozen=True)
class Place:
    """A window of a picture's tokens.

    Attributes:
        window: of the picture, in tokens.
        grid: token rows and columns of the picture.
    """

    window: Crop
    grid: Grid

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns."""
        starts, side = (self.window.top, self.window.left), self.window.side
        high, wide = (slice(start, start + side) for start in starts)
        return high, wide

    @property
    def outside(self) -> Tensor:
        """Whether each token is around the window, [rows, columns] bool."""
        outside = torch.ones(self.grid, dtype=torch.bool)
        outside[self.slices] = False
        return outside


class Ear:
    """Lets a block hear what is around a window, from `put` to `remove`.

    Args:
        block: of a transformer.
        everything: whether its attention hears too, or its convolutions alone.
    """

    attention: ClassVar[str]
    """Name of the block's self-attention."""

    def __init__(self, block: Any, everything: bool) -> None:
        self.block, self.everything = block, everything

    @staticmethod
    def hooks(block: Any, seen: Seen) -> list[Any]:
        """Let ``seen`` keep what more `of` needs than keys and values; the hooks."""
        return []

    @staticmethod
    def of(
        block: Any, seen: Seen, place: Place, row: int, cond: Mapping[str, Tensor], cell: int
    ) -> Heard:
        """What there is to hear of one picture.

        Args:
            block: that ran.
            seen: what it left.
            place: of the window.
            row: number of the picture in the batch.
            cond: conditioning of the picture.
            cell: side of the cells, in tokens, whose means are heard.
        """
        raise NotImplementedError

    def put(self) -> None:
        raise NotImplementedError

    def remove(self) -> None:
        raise NotImplementedError

    def hear(self, rows: Sequence[Heard]) -> None:
        """Hear this from now on, each row of the batch its own."""
        raise NotImplementedError


# ---------------------------------------------------------------- SANA


class _Linear:
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


class SanaEar(Ear):
    """Sums of attention over the tokens outside, [1, heads, d + 1, d], and what the convolution
    reads around the window, zeros within it and beyond the picture, [1, C, side + 2, side + 2]
    float16.
    """

    attention = "attn1"

    @staticmethod
    def hooks(block: Any, seen: Seen) -> list[Any]:
        def keep(_module: nn.Module, inputs: tuple[Tensor]) -> None:
            seen["ring"] = inputs[0]

        return [block.ff.conv_depth.register_forward_pre_hook(keep)]

    @staticmethod
    def of(
        block: Any, seen: Seen, place: Place, row: int, cond: Mapping[str, Tensor], cell: int
    ) -> Heard:
        heads, outside = block.attn1.heads, place.outside.flatten()
        key, value = (seen[name][row, outside].unflatten(-1, (heads, -1)) for name in ("k", "v"))
        sums = torch.einsum("nhe,nhd->hed", F.pad(value, (0, 1), value=1.0), F.relu(key))
        high, wide = (slice(each.start, each.stop + 2) for each in place.slices)
        ring = F.pad(seen["ring"][row], (1, 1, 1, 1))[:, high, wide].half()
        ring[:, 1:-1, 1:-1] = 0
        return sums[None], ring[None]

    def put(self) -> None:
        block = self.block
        self.before = block.attn1.processor, block.ff.conv_depth
        self.linear, self.convolution = _Linear(), _Convolution(block.ff.conv_depth)
        block.ff.conv_depth = self.convolution
        if self.everything:
            block.attn1.processor = self.linear

    def remove(self) -> None:
        self.block.attn1.processor, self.block.ff.conv_depth = self.before

    def hear(self, rows: Sequence[Heard]) -> None:
        self.linear.sums = torch.cat([sums for sums, _ in rows])
        self.convolution.ring = torch.cat([ring for _, ring in rows]).float()


# ---------------------------------------------------------------- FLUX


class _Joint:
    """FLUX's attention, which hears keys, already rotated, and values, [B, N, heads, d], each as
    often as ``times`` says.
    """

    keys: Tensor
    values: Tensor
    times = 1

    def __call__(
        self, attention: Any, image: Tensor, text: Tensor | None, _mask: None, rotary: Any
    ) -> Any:
        def projected(x: Tensor, *layers: nn.Module) -> list[Tensor]:
            return [layer(x).unflatten(-1, (-1, attention.head_dim)) for layer in layers]

        layers = attention.to_q, attention.to_k, attention.to_v
        query, key, value = projected(image, *layers)
        query, key = attention.norm_q(query), attention.norm_k(key)
        if text is not None:
            layers = attention.add_q_proj, attention.add_k_proj, attention.add_v_proj
            q, k, v = projected(text, *layers)
            query = torch.cat([attention.norm_added_q(q), query], 1)
            key, value = torch.cat([attention.norm_added_k(k), key], 1), torch.cat([v, value], 1)
        query, key = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in (query, key))
        mask = None
        if self.times > 1:
            mask = torch.zeros(1, key.shape[1] + self.keys.shape[1])
            mask[:, key.shape[1] :] = math.log(self.times)
        key, value = torch.cat([key, self.keys], 1), torch.cat([value, self.values], 1)
        found = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask
        )
        found = found.transpose(1, 2).flatten(2)
        if text is None:
            return found
        words, picture = found.split([text.shape[1], image.shape[1]], 1)
        return attention.to_out[1](attention.to_out[0](picture)), attention.to_add_out(words)


class FluxEar(Ear):
    """Keys, rotated, and values of the tokens outside or of their cells, [1, N, heads, d] float16,
    and how many tokens each is of.
    """

    attention = "attn"

    @staticmethod
    def of(
        block: Any, seen: Seen, place: Place, row: int, cond: Mapping[str, Tensor], cell: int
    ) -> Heard:
        tokens = math.prod(place.grid)
        rotary = [cond[f"rope_{name}"][-tokens:] for name in ("cos", "sin")]
        key = apply_rotary_emb(seen["k"][row : row + 1, -tokens:], rotary, sequence_dim=1)
        value = seen["v"][row, -tokens:].unflatten(-1, (-1, block.attn.head_dim))
        outside = place.outside
        if cell == 1:
            here = outside.flatten()
            return key[:, here].half(), value[None, here].half(), torch.ones(1, 1)
        # of cells that are all outside; the others' tokens around the window are not heard
        cells = outside.unfold(0, cell, cell).unfold(1, cell, cell).flatten(2).all(2).flatten()

        def means(x: Tensor) -> Tensor:
            rows = x.unflatten(0, place.grid).unfold(0, cell, cell).unfold(1, cell, cell)
            return rows.mean((-1, -2)).flatten(0, 1)[cells][None].half()

        return means(key[0]), means(value), torch.full((1, 1), float(cell**2))

    def put(self) -> None:
        self.before, self.joint = self.block.attn.processor, _Joint()
        self.block.attn.processor = self.joint

    def remove(self) -> None:
        self.block.attn.processor = self.before

    def hear(self, rows: Sequence[Heard]) -> None:
        keys, values, times = (torch.cat(of).float() for of in zip(*rows, strict=True))
        self.joint.keys, self.joint.values, self.joint.times = keys, values, int(times[0])


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


# ---------------------------------------------------------------- both


def ear_of(block: Any) -> type[Ear]:
    """The `Ear` of a kind of block."""
    return SanaEar if hasattr(block, SanaEar.attention) else FluxEar


@contextmanager
def listening(block: Any) -> Iterator[Seen]:
    """Keys and values of a block's self-attention by "k" and "v", and what else its `Ear` needs,
    after each time that it has run.
    """
    seen: Seen = {}
    ear = ear_of(block)
    attention = getattr(block, ear.attention)

    def output_to(name: str) -> Any:
        return lambda _module, _inputs, output: seen.__setitem__(name, output)

    hooks = [
        (attention.norm_k or attention.to_k).register_forward_hook(output_to("k")),
        attention.to_v.register_forward_hook(output_to("v")),
        *ear.hooks(block, seen),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def hearing(blocks: Sequence[Any], everything: bool) -> Iterator[list[Ear]]:
    """Let blocks' convolutions hear what `set_heard` says, and their attention if that is to, until
    the end.
    """
    ears = [ear_of(block)(block, everything) for block in blocks]
    try:
        for ear in ears:
            ear.put()
        yield ears
    finally:
        for ear in ears:
            ear.remove()


def set_heard(ears: list[Ear], heard: Sequence[Sequence[Heard]]) -> None:
    """What the blocks hear from now on.

    Args:
        ears: from `hearing`.
        heard: of each row of the batch, for each block.
    """
    for ear, rows in zip(ears, zip(*heard, strict=True), strict=True):
        ear.hear(rows)
