"""What a window of a picture's tokens misses of the rest, and blocks that are given it.

A block that sees a window of a picture's tokens lacks the others in two places:

- In attention. Softmax attention reads keys and values of every token: those around the window are
  given as means over cells of 2 x 2 tokens, each counted as often as it has tokens there. Linear
  attention reads sums over tokens: those around the window have a sum too, which is small however
  many they are.
- In convolutions. A 3 x 3 depthwise convolution reads one token beyond the window. It is frozen, so
  what that adds to its output is a constant.

All of it is the base model's, taken where the whole picture passes its blocks. The adapted model's
would differ a little, as a stored residual does. With LoRA's B at zero blocks with linear attention
compute in a window what they compute in the whole picture.

Conditioning of a block ("outside_<what>.<block>"), with d the width of a head:

    linear attention
        outside_sums     [1, heads, d + 1, d]   sum of [v, 1] relu(k)^T
        outside_edge     [1, C, 4 side - 4]     what the convolution reads beyond the window, times
                                                its weights, at the tokens that read it: first and
                                                last row, then the rest of first and last column
    softmax attention
        outside_keys     [1, cells, heads, d]   rotated; means over a cell's tokens outside
        outside_values   [1, cells, heads, d]   the same
        outside_mask     [1, cells]             added to logits: log of how many these are, or
                                                -10000 where there are none
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_dit.contract.names import OUTSIDE
from edge_dit.pictures.window import Window

ABSENT = -10000.0
"""Added to the logit of what is not there; its weight is then exactly 0 in float32."""
Seen = dict[str, Tensor]
"""What `Surroundings.watch` kept of a block that ran on a whole picture."""


class Surroundings(Protocol):
    """What a kind of blocks misses, and how it is given."""

    def watch(self, block: Any) -> AbstractContextManager[Seen]:
        """A context in which the block leaves what `around` needs when it runs on a picture.

        Args:
            block: of a transformer.
        """
        ...

    def around(self, block: Any, seen: Seen, window: Window) -> dict[str, Tensor]:
        """What there is around a window, by the names of the module's table without the block's.

        Args:
            block: that ran.
            seen: what it left.
            window: of the picture that it ran on.
        """
        ...

    def blank(self, block: Any, side: int, whole: int) -> dict[str, Tensor]:
        """Zeros shaped as `around`.

        Args:
            block: of a transformer; may lie on the meta device.
            side: tokens of a window's side.
            whole: tokens of the picture's side.
        """
        ...

    def given(self, block: Any, cond: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """A context in which the block has what is around the window that it runs on.

        Args:
            block: of a transformer.
            cond: its conditioning, by the names of the module's table without the block's.
        """
        ...


def are_given(cond: Mapping[str, Tensor]) -> bool:
    """Whether a block's conditioning has what is around a window."""
    return any(name.startswith(OUTSIDE) for name in cond)


# ---------------------------------------------------------------- linear attention and convolution


class LinearSurroundings:
    """Of SANA's blocks: linear self-attention "attn1", depthwise convolution "ff.conv_depth"."""

    @contextmanager
    def watch(self, block: Any) -> Iterator[Seen]:
        """As `Surroundings.watch`."""
        seen: Seen = {}
        attention = block.attn1

        def keep(name: str) -> Callable[..., None]:
            return lambda _module, _inputs, output: seen.__setitem__(name, output)

        hooks = [
            (attention.norm_k or attention.to_k).register_forward_hook(keep("key")),
            attention.to_v.register_forward_hook(keep("value")),
            block.ff.conv_inverted.register_forward_hook(keep("inner")),
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def around(self, block: Any, seen: Seen, window: Window) -> dict[str, Tensor]:
        """As `Surroundings.around`."""
        outside, heads = torch.from_numpy(window.outside).flatten(), block.attn1.heads
        key, value = (seen[k][0, outside].unflatten(-1, (heads, -1)) for k in ("key", "value"))
        sums = torch.einsum("nhe,nhd->hed", F.pad(value, (0, 1), value=1.0), F.relu(key))
        inner = F.pad(block.ff.nonlinearity(seen["inner"]), (1, 1, 1, 1))
        top, left, side = window.place.top, window.place.left, window.place.side
        beyond = inner[:, :, top : top + side + 2, left : left + side + 2].clone()
        beyond[:, :, 1:-1, 1:-1] = 0
        convolution = block.ff.conv_depth
        added = F.conv2d(beyond, convolution.weight, groups=convolution.groups)
        return {f"{OUTSIDE}sums": sums[None], f"{OUTSIDE}edge": _edge_of(added)}

    def blank(self, block: Any, side: int, whole: int) -> dict[str, Tensor]:
        """As `Surroundings.blank`."""
        heads = block.attn1.heads
        each = block.attn1.inner_dim // heads
        channels = block.ff.conv_depth.in_channels
        return {
            f"{OUTSIDE}sums": torch.zeros(1, heads, each + 1, each),
            f"{OUTSIDE}edge": _edge_of(torch.zeros(1, channels, side, side)),
        }

    @contextmanager
    def given(self, block: Any, cond: Mapping[str, Tensor]) -> Iterator[None]:
        """As `Surroundings.given`."""
        processor, edge = block.attn1.processor, cond[f"{OUTSIDE}edge"]
        block.attn1.processor = partial(_linear_attention, cond[f"{OUTSIDE}sums"])
        hook = block.ff.conv_depth.register_forward_hook(
            lambda _module, _inputs, output: output + _at_edge(edge, output.shape[-1])
        )
        try:
            yield
        finally:
            block.attn1.processor = processor
            hook.remove()


def _edge_of(image: Tensor) -> Tensor:
    """The outermost values of a square [1, C, side, side], as `_at_edge` takes them."""
    if image.shape[-1] == 1:
        return image.flatten(2)
    columns = image[:, :, 1:-1]
    parts = [image[:, :, 0], image[:, :, -1], columns[..., 0], columns[..., -1]]
    return torch.cat(parts, 2)


def _at_edge(edge: Tensor, side: int) -> Tensor:
    """A square [1, C, side, side] of zeros but for its outermost values, [1, C, 4 side - 4]."""
    if side == 1:
        return edge[..., None]
    first, last, left, right = edge.split([side, side, side - 2, side - 2], 2)
    zeros = edge.new_zeros(*edge.shape[:2], side - 2, side - 2)
    middle = torch.cat([left[..., None], zeros, right[..., None]], 3)
    return torch.cat([first[:, :, None], middle, last[:, :, None]], 2)


def _linear_attention(sums: Tensor, attention: Any, hidden_states: Tensor, **_: Any) -> Tensor:
    """Diffusers' SanaLinearAttnProcessor2_0 on the tokens of a window, and on others' sums."""
    query, key = attention.to_q(hidden_states), attention.to_k(hidden_states)
    if attention.norm_q is not None:
        query = attention.norm_q(query)
    if attention.norm_k is not None:
        key = attention.norm_k(key)
    value = attention.to_v(hidden_states)
    query, key, value = (
        x.transpose(1, 2).unflatten(1, (attention.heads, -1)) for x in (query, key, value)
    )
    counted = F.pad(value, (0, 0, 0, 1), value=1.0)
    every = counted @ F.relu(key).transpose(2, 3) + sums
    found = every @ F.relu(query)
    mean = found[:, :, :-1] / (found[:, :, -1:] + 1e-15)
    return attention.to_out[1](attention.to_out[0](mean.flatten(1, 2).transpose(1, 2)))


# ---------------------------------------------------------------- softmax attention


@dataclass(frozen=True)
class SoftmaxSurroundings:
    """Of blocks "attn" whose one softmax attention is over text and image tokens, image last.

    Attributes:
        module: gives the module of diffusers that has the family's blocks.
        cell: tokens of the side of the cells whose keys and values are averaged; 1 if the picture's
            side is odd.
    """

    module: Callable[[], ModuleType]
    cell: int = 2

    @contextmanager
    def _attending(self, attend: Callable[..., Tensor]) -> Iterator[None]:
        """A context in which attention is ``attend`` of diffusers' own and its arguments."""
        module: Any = self.module()
        own = module.dispatch_attention_fn
        module.dispatch_attention_fn = partial(attend, own)
        try:
            yield
        finally:
            module.dispatch_attention_fn = own

    @contextmanager
    def watch(self, block: Any) -> Iterator[Seen]:
        """As `Surroundings.watch`."""
        seen: Seen = {}

        def attend(own: Any, query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
            seen["key"], seen["value"] = key, value
            return own(query, key, value, **more)

        with self._attending(attend):
            yield seen

    def around(self, block: Any, seen: Seen, window: Window) -> dict[str, Tensor]:
        """As `Surroundings.around`."""
        cell = math.gcd(window.side, self.cell)
        count = window.side // cell

        outside = torch.from_numpy(window.outside).float().reshape(count, cell, count, cell)
        tokens = outside.sum((1, 3)).flatten()

        def means(x: Tensor) -> Tensor:
            image = x[:, -(window.side**2) :].unflatten(1, (count, cell, count, cell))
            sums = (image * outside[..., None, None]).sum((2, 4)).flatten(1, 2)
            return sums / tokens.clamp(min=1)[:, None, None]

        mask = torch.where(tokens > 0, tokens.clamp(min=1).log(), ABSENT)
        return {
            f"{OUTSIDE}keys": means(seen["key"]),
            f"{OUTSIDE}values": means(seen["value"]),
            f"{OUTSIDE}mask": mask[None],
        }

    def blank(self, block: Any, side: int, whole: int) -> dict[str, Tensor]:
        """As `Surroundings.blank`."""
        cells = (whole // math.gcd(whole, self.cell)) ** 2
        shape = (1, cells, block.attn.heads, block.attn.head_dim)
        return {
            f"{OUTSIDE}keys": torch.zeros(shape),
            f"{OUTSIDE}values": torch.zeros(shape),
            f"{OUTSIDE}mask": torch.zeros(1, cells),
        }

    def given(self, block: Any, cond: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """As `Surroundings.given`."""
        keys, values, outside = (cond[OUTSIDE + kind] for kind in ("keys", "values", "mask"))

        def attend(own: Any, query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
            within = outside.new_zeros(outside.shape[0], key.shape[1])
            mask = torch.cat([within, outside], 1)[:, None, None]
            every = torch.cat([key, keys], 1), torch.cat([value, values], 1)
            return own(query, *every, **{**more, "attn_mask": mask})

        return self._attending(attend)
