"""How much of full LoRA's gain a plan keeps, by what was measured on the sample models.

The gain is the improvement of held-out loss over the base model; a plan keeps a share of what LoRA
on all blocks at full resolution gains in as many steps. What it misses is taken as a sum:

    missing = SKIPPED skipped + CROP crop + WINDOW window + RANK rank + SURROUNDED surrounded

with the terms of `Terms`. samples/reproduce/calibrate.py fits the factors, none below 0, to the
ablations of tiny-sana and tiny-flux (samples/reproduce/results), and writes them to quality.json
with every measured point. Its error is that of points that were left out: each is predicted by the
factors that fit the others, and the root of their mean square is what is stated. Real checkpoints
were not measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

from edge_dit.contract.names import FRESH, STORED, THROUGH, Tail
from edge_dit.planning.plan import Plan
from edge_dit.planning.selection import Selection

NAME = "quality.json"
STEPS = 200
"""Of the runs that it is fitted to."""
THROUGH_SHARE, FRESH_SHARE = 0.1, 0.2
"""What a tail costs that runs, where a selection did not measure it. Through: this share of what a
stored one costs; a guess on the safe side. Fresh: so far on the way from there to a stored one, the
mean of both models with 50 % of the blocks skipped (docs/method.md, "Three ways to skip a tail
block": 0.20 and 0.21).
"""
Split = tuple[int, int, Sequence[tuple[int, int]]]
"""Skipped leading blocks, trailing ones, and runs [first, end) between trained ones."""


def skip_cost(selection: Selection, split: Split, tail: Tail) -> float:
    """What a selection measured skipping some blocks to cost, in what all of them cost.

    Args:
        selection: of the model.
        split: which are skipped.
        tail: what takes the place of the trailing ones.
    """
    head_skip, tail_skip, inner_skips = split
    unit, run = selection.head[selection.layers], selection.tail_run
    stored = selection.tail[tail_skip] / unit
    whole = selection.score(head_skip, tail_skip, inner_skips) / unit
    through = run[tail_skip] / unit if run else THROUGH_SHARE * stored
    return max(0.0, whole - stored + tail_cost(stored, through, tail))


def terms_of(plan: Plan, selection: Selection) -> Terms | None:
    """What a plan gives up, against LoRA of its rank; None if its runs between trained blocks were
    not measured.

    Args:
        plan: of a model.
        selection: of that model.
    """
    try:
        split = plan.head_skip, plan.tail_skip, plan.inner_skips
        skipped = skip_cost(selection, split, plan.tail)
    except ValueError:
        return None
    patch = terms_of_patch(plan.s_min / plan.s_max, plan.window, plan.surroundings)
    return replace(patch, skipped=skipped)


def terms_of_patch(share: float, window: bool, surroundings: bool = False) -> Terms:
    """What a patch gives up.

    Args:
        share: s_min / s_max.
        window: whether it is a window.
        surroundings: whether blocks are given what is around it.
    """
    if surroundings:
        return Terms(surrounded=1 - share)
    return Terms(window=1 - share) if window else Terms(crop=1 - share)


def tail_cost(stored: float, through: float, tail: Tail) -> float:
    """What a tail costs, of what a stored one and one that the gradient passes cost."""
    fresh = through + FRESH_SHARE * (stored - through)
    return {STORED: stored, FRESH: fresh, THROUGH: through}[tail]


@dataclass(frozen=True)
class Terms:
    """What a plan gives up.

    Attributes:
        skipped: what the selection measured skipping its blocks to cost, in what it measured
            skipping all of them to cost.
        crop: 1 - s_min / s_max, where patches are resized crops.
        window: the same, where they are windows.
        rank: how often full LoRA's rank is halved.
        surrounded: as window, where blocks are given what is around it.
    """

    skipped: float = 0.0
    crop: float = 0.0
    window: float = 0.0
    rank: float = 0.0
    surrounded: float = 0.0

    def values(self) -> list[float]:
        """In the order of the fields."""
        return [self.skipped, self.crop, self.window, self.rank, self.surrounded]


@dataclass(frozen=True)
class Point:
    """A plan that was trained.

    Attributes:
        model: it was trained on.
        arm: of samples/reproduce.
        terms: what it gives up.
        kept: share of full LoRA's gain, mean over its runs.
        error: standard error of that.
        predicted: by the factors that fit the other points.
    """

    model: str
    arm: str
    terms: Terms
    kept: float
    error: float
    predicted: float


@dataclass(frozen=True)
class Quality:
    """The calibration.

    Attributes:
        factors: of the terms.
        error: root mean square of kept - predicted over points that were left out.
        points: that it is of.
    """

    factors: Terms
    error: float
    points: list[Point]

    def missing(self, terms: Terms) -> float:
        """The share of full LoRA's gain that a plan is predicted to miss."""
        pairs = zip(self.factors.values(), terms.values(), strict=True)
        return sum(factor * value for factor, value in pairs)

    def kept(self, terms: Terms) -> float:
        """The share that it is predicted to keep, in [0, 1]."""
        return min(1.0, max(0.0, 1 - self.missing(terms)))

    def in_words(self, terms: Terms) -> str:
        """That share, and how far such predictions were off."""
        models = sorted({point.model for point in self.points})
        return (
            f"by ablations of {STEPS} steps on {' and '.join(models)}, expected to keep "
            f"{100 * self.kept(terms):.0f} % of what LoRA on all blocks at full resolution gains; "
            f"plans there that were left out of the fit were predicted within "
            f"{100 * self.error:.1f} % (root mean square), other models and longer runs were not"
        )


@cache
def quality() -> Quality:
    """The calibration in `NAME`."""
    raw = json.loads((files("edge_dit.budget") / NAME).read_text("utf-8"))
    points = [Point(**{**point, "terms": Terms(**point["terms"])}) for point in raw["points"]]
    return Quality(Terms(**raw["factors"]), raw["error"], points)
