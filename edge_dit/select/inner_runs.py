"""Splits that also skip a run of blocks between trained ones.

There are too many to measure each. First every run of 1, 2, 4, ... blocks is measured alone. Then,
for every number k of skipped blocks, the few splits whose parts cost least in sum are measured as a
whole, and compared with the best head and tail of k blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np

from edge_dit.contract.split import trained_blocks
from edge_dit.planning.selection import Between, Selection
from edge_dit.reference.evaluate import LEVELS
from edge_dit.select.replay import losses_of_splits
from edge_dit.select.subjects import Measure, Subject, TunedSubjects

SHORTLIST = 4
"""Candidates measured for every number of skipped blocks."""

Run = tuple[int, int]
"""Blocks [first, end) between trained ones."""


def runs_to_measure(layers: int) -> list[Run]:
    """The runs that are measured alone: of 1, 2, 4, ... blocks, each half its length after the one
    before. Example: 5 blocks give [1, 2), [2, 3), [3, 4), [1, 3), [2, 4).
    """
    lengths = [2**power for power in range(layers.bit_length()) if 2**power <= layers - 2]
    return [
        (first, first + length)
        for length in lengths
        for first in range(1, layers - length, max(1, length // 2))
    ]


def best_inner_runs(
    tuned: TunedSubjects, ends: Selection, run_costs: Mapping[Run, float]
) -> tuple[list[Between], float]:
    """For every number of skipped blocks, the measured split with a run that gains most.

    Args:
        tuned: the subjects and the model.
        ends: costs of heads and tails.
        run_costs: increase of the loss when a run alone is skipped.

    Returns:
        The splits with what they gain over the best head and tail of as many blocks, and the
        seconds that measuring took. Nothing is measured on fewer than two images: a gain without a
        standard error decides nothing.
    """
    blocks = tuned.model.family.blocks(tuned.pipeline.transformer).values()
    splits = candidates(ends, run_costs, [type(block) for block in blocks])
    if not splits or sum(len(subject.measured) for subject in tuned.subjects) < 2:
        return [], 0.0
    rivals = {k: ends.best(k) for k in dict.fromkeys(split.skipped for split in splits)}
    trained = [trained_blocks(ends.layers, head, tail) for head, tail in rivals.values()]
    trained += [_trained(ends.layers, split) for split in splits]

    settings, parts = {"levels": LEVELS, "splits": trained}, by_splits(tuned, trained)
    results, seconds = tuned.measure("inner-runs", settings, len(trained), parts)
    losses = np.concatenate(results).T  # [splits, images]
    loss_of_rival = dict(zip(rivals, losses, strict=False))
    measured = [
        _with_gain(split, loss_of_rival[split.skipped] - loss)
        for split, loss in zip(splits, losses[len(rivals) :], strict=True)
    ]
    best = [max((s for s in measured if s.skipped == k), key=lambda s: s.gain) for k in rivals]
    return best, seconds


def by_splits(tuned: TunedSubjects, splits: Sequence[Sequence[int]]) -> list[Measure]:
    """Measures the loss of splits; a part for each share of them.

    Args:
        tuned: the subjects and the model.
        splits: numbers of the blocks that are trained, for each split.
    """
    shares = tuned.shares(len(splits))
    return [partial(_losses, [splits[n] for n in share]) for share in shares]


def _losses(
    splits: Sequence[Sequence[int]], tuned: TunedSubjects, subject: Subject, title: str
) -> np.ndarray:
    images, transformer = tuned.encode(subject.measured), tuned.pipeline.transformer
    return losses_of_splits(tuned.model, transformer, images, splits, title)


def candidates(
    ends: Selection, run_costs: Mapping[Run, float], kinds: Sequence[type]
) -> list[Between]:
    """The `SHORTLIST` most promising splits with a run, for every number of skipped blocks.

    A split is promising if the sum of what its head, tail and run cost is small. Only splits that
    train as many blocks of each kind as the best head and tail are taken, so that memory is equal.

    Args:
        ends: costs of heads and tails.
        run_costs: costs of the runs to choose from.
        kinds: class of each of the model's blocks.
    """
    layers, chosen = ends.layers, []

    def kinds_in(trained: Iterable[int]) -> Counter[type]:
        return Counter(kinds[number] for number in trained)

    def cost(split: Between) -> float:
        return ends.score(split.head_skip, split.tail_skip) + run_costs[split.run]

    for skipped in range(1, layers - 1):
        wanted = kinds_in(trained_blocks(layers, *ends.best(skipped)))
        splits = _splits_with_run(layers, skipped, run_costs)
        alike = [split for split in splits if kinds_in(_trained(layers, split)) == wanted]
        chosen += sorted(alike, key=cost)[:SHORTLIST]
    return chosen


def _splits_with_run(layers: int, skipped: int, runs: Iterable[Run]) -> list[Between]:
    """Every split of so many skipped blocks with one of the runs, trained blocks on its sides."""
    splits = []
    for first, end in runs:
        rest = skipped - (end - first)  # blocks of head and tail together
        for head in range(min(first, rest + 1)):
            if end < layers - (rest - head):
                splits.append(Between(head_skip=head, tail_skip=rest - head, run=(first, end)))
    return splits


def _trained(layers: int, split: Between) -> list[int]:
    return trained_blocks(layers, split.head_skip, split.tail_skip, [split.run])


def _with_gain(split: Between, gains: np.ndarray) -> Between:
    """The split with the mean gain and its standard error over images, ``gains`` [images]."""
    error = gains.std(ddof=1) / len(gains) ** 0.5
    return split.model_copy(update={"gain": float(gains.mean()), "error": float(error)})
