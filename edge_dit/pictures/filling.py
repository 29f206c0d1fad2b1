"""Fills a bank, on the host (`edge_dit.reference.precompute`) and on the device alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from edge_dit.contract import bank
from edge_dit.pictures.dataset import Captioned, check_readable
from edge_dit.progress import bar

Tensors = Mapping[str, np.ndarray]


class Maker(Protocol):
    """Makes the tensors of draws, with a model at hand."""

    def per_prompt(self) -> Sequence[Tensors]:
        """What depends on the prompt alone, of every prompt of the bank, by batch names."""
        ...

    def draws(self, numbers: Sequence[int], advance: Callable[..., None]) -> Iterable[Tensors]:
        """The batch tensors of draws.

        Args:
            numbers: of the draws.
            advance: of a progress bar that counts draws.
        """
        ...


def fill(
    folder: Path,
    index: bank.Index,
    images: Sequence[Captioned],
    shared: Iterable[str],
    maker: Callable[[], Maker],
) -> None:
    """Write a bank, or finish one that was stopped.

    Args:
        folder: where the bank goes.
        index: of the bank.
        images: that its draws are made of, by number.
        shared: batch tensors that depend on the prompt alone.
        maker: opens the model; called once all pictures were found readable, and only if something
            is missing.

    Raises:
        BadInput: the folder holds another bank, or pictures that are drawn cannot be decoded, which
            is found before any draw is computed.
    """
    occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    missing = bank.begin(folder, index) if occupied else None
    if missing == [] and (folder / bank.PROMPTS).is_file():
        return
    shards = range(index.shards) if missing is None else missing
    drawn = {index.draws[number].image for shard in shards for number in index.members(shard)}
    check_readable(images[number] for number in sorted(drawn))
    made, once = maker(), set(shared)
    if missing is None:  # not before: a model that cannot be loaded leaves no bank behind
        missing = bank.begin(folder, index)
    if not (folder / bank.PROMPTS).is_file():
        bank.write_prompts(folder, made.per_prompt())
    done = len(index.draws) - sum(len(index.members(shard)) for shard in missing)
    with bar("precompute", len(index.draws), done) as advance:
        for shard in missing:
            numbers = index.members(shard)
            stored = (
                bank.narrowed({n: v for n, v in draw.items() if n not in once}, index.dtype)
                for draw in made.draws(numbers, advance)
            )
            bank.write_shard(folder, shard, dict(zip(numbers, stored, strict=True)))
