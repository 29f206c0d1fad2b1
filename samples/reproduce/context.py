"""What a part of a picture's tokens has of the rest.

A window's blocks are given it as `edge_dit.models.families.parts.surroundings` says; arms may have
it in their convolutions alone, or of every token where `edge_dit` takes means over cells.

A block of FLUX that sees one token of each cell of a picture hears the others through it: as often
as the cell has tokens, if its logits are raised by the logarithm of that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from arms import Arm
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from edge_dit.contract.bank import is_halved
from edge_dit.contract.names import COND, OUTSIDE
from edge_dit.models.families.family import Family
from edge_dit.models.families.parts.surroundings import Seen, SoftmaxSurroundings, Surroundings
from edge_dit.pictures.window import Window

SUMS = f"{OUTSIDE}sums"


def surroundings_of(family: Family, arm: Arm) -> Surroundings:
    """How blocks are given what is around a window: the family's way, with the arm's cells."""
    way = family.surroundings
    if way is None:
        raise TypeError(f"blocks of {family.name} cannot be given surroundings")
    return replace(way, cell=arm.cell) if isinstance(way, SoftmaxSurroundings) else way


def around(
    way: Surroundings, arm: Arm, block: Any, seen: Seen, row: int, window: Window
) -> dict[str, Tensor]:
    """What there is around a window, large parts in float16, as a bank may store them.

    Args:
        way: from `surroundings_of`.
        arm: whose.
        block: that ran on a batch of pictures.
        seen: what it left.
        row: number of the picture in the batch.
        window: of it.
    """
    found = way.around(block, {name: value[row : row + 1] for name, value in seen.items()}, window)
    if arm.context == "convolutions":
        found[SUMS] = torch.zeros_like(found[SUMS])
    return {name: v.half() if is_halved(COND + name) else v for name, v in found.items()}


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
