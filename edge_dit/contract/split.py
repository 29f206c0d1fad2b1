"""Which blocks are skipped: arithmetic of their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def trained_blocks(
    layers: int, head_skip: int, tail_skip: int, inner_skips: Sequence[tuple[int, int]] = ()
) -> list[int]:
    """Numbers of the blocks that are not skipped, ascending.

    Args:
        layers: number of blocks of the model.
        head_skip: number of leading blocks to skip (n).
        tail_skip: number of trailing blocks to skip (m).
        inner_skips: runs [first, end) of blocks to skip between them.
    """
    inside = {number for first, end in inner_skips for number in range(first, end)}
    return [n for n in range(head_skip, layers - tail_skip) if n not in inside]


def inner_runs(trained: Sequence[int]) -> dict[int, int]:
    """Runs of skipped blocks between trained ones: next trained block -> first block of the run.

    Args:
        trained: numbers of the trained blocks, ascending: [0, 3] gives {3: 1}.
    """
    pairs = pairwise(trained)
    return {after: before + 1 for before, after in pairs if after > before + 1}


def borders(layers: int, trained: Sequence[int], tail: bool) -> set[int]:
    """Numbers of the blocks that a stored tensor needs the entering state of; ``layers`` is the
    last state.

    Args:
        layers: number of blocks of the model.
        trained: numbers of the trained blocks, ascending.
        tail: whether the residual of the skipped tail is stored.
    """
    runs = inner_runs(trained)
    end = {trained[-1] + 1, layers} if tail else set()
    return {trained[0], *runs, *runs.values(), *end}
