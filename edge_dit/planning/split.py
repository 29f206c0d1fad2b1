"""Which blocks to skip: the split that is asked for, or that a ratio and a selection give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from edge_dit.contract.split import trained_blocks
from edge_dit.errors import BadInput
from edge_dit.planning.job import PlanOptions
from edge_dit.planning.selection import Selection

RATIO = 0.5
"""Share of blocks that is skipped where nothing is asked for."""
RATIO_PLACE = "skip_ratio (--skip-ratio)"
"""Where a share of blocks is asked for, for messages."""
HEAD_SHARE = 2 / 3
"""Share of the skipped blocks taken from the front when only a ratio is asked for.

The state that enters the trained blocks is exact, the tail residual is not (docs/method.md, Eq. 3).
Of the paper's one-sided ablations, skipping the front is by far the milder: DINO 0.6651 against
0.4808 (docs/method.md, Tables 2 and 4). So the front gives more, and both ends give something.
"""
Run = tuple[int, int]
"""Blocks [first, end)."""


@dataclass(frozen=True)
class SplitRequest:
    """Which blocks someone asks to skip; None where nothing is asked for.

    Attributes:
        skip_ratio: share of the blocks, in [0, 1).
        head_skip: number of leading blocks (n).
        tail_skip: number of trailing blocks (m).
        inner_skips: runs between trained blocks.
    """

    skip_ratio: float | None = None
    head_skip: int | None = None
    tail_skip: int | None = None
    inner_skips: tuple[Run, ...] = ()


@dataclass(frozen=True)
class Split:
    """Which blocks are skipped, and what is wrong with that.

    Attributes:
        layers: number of blocks of the model.
        head_skip: number of leading blocks skipped (n).
        tail_skip: number of trailing blocks skipped (m).
        inner_skips: runs skipped between trained blocks.
        faults: why no model can be trained so.
    """

    layers: int
    head_skip: int
    tail_skip: int
    inner_skips: tuple[Run, ...] = ()
    faults: list[BadInput] = field(default_factory=list)

    @property
    def trained(self) -> list[int]:
        """Numbers of the trained blocks, ascending."""
        return trained_blocks(self.layers, self.head_skip, self.tail_skip, self.inner_skips)


def requested(options: PlanOptions, request: SplitRequest | None = None) -> SplitRequest:
    """What a job asks for, unless ``request`` overrides it.

    A request replaces the job's head, tail and inner runs together; without a ratio of its own it
    keeps the job's.

    Args:
        options: of the job.
        request: given beside the job; None or an empty one changes nothing.
    """
    if request is None or request == SplitRequest():
        runs = tuple(options.inner_skips)
        return SplitRequest(options.skip_ratio, options.head_skip, options.tail_skip, runs)
    if request.skip_ratio is None:
        return replace(request, skip_ratio=options.skip_ratio)
    return request


def choose_split(layers: int, request: SplitRequest, selection: Selection | None = None) -> Split:
    """The split that is asked for; ends that are not follow from the ratio.

    Args:
        layers: number of blocks of the model.
        request: what is asked for.
        selection: of the model. It decides which blocks the ratio skips, and may propose a run
            between trained blocks where neither end and no run is asked for.
    """
    ratio = RATIO if request.skip_ratio is None else request.skip_ratio
    if not 0 <= ratio < 1:
        fault = BadInput(RATIO_PLACE, found=str(ratio), expected="a share in [0, 1)")
        return Split(layers, 0, 0, faults=[fault])
    skipped, inner = round(layers * ratio), request.inner_skips
    if selection is not None and skipped < layers:
        head, tail = selection.best(skipped)
        better = selection.proposed(skipped)
        if better and request.head_skip is None and request.tail_skip is None and not inner:
            head, tail, inner = better.head_skip, better.tail_skip, (better.run,)
    else:
        head, tail = split_by_ratio(layers, ratio)
    head = head if request.head_skip is None else request.head_skip
    tail = tail if request.tail_skip is None else request.tail_skip
    return Split(layers, head, tail, inner, split_faults(layers, head, tail, inner))


def split_by_ratio(layers: int, skip_ratio: float) -> tuple[int, int]:
    """(head_skip, tail_skip) for a share of skipped blocks, `HEAD_SHARE` of them at the front."""
    skipped = round(layers * skip_ratio)
    head = math.ceil(skipped * HEAD_SHARE)
    return head, skipped - head


def split_faults(layers: int, head: int, tail: int, runs: Sequence[Run]) -> list[BadInput]:
    """Why no model of ``layers`` blocks can be trained with these skips; empty if it can."""
    if head + tail >= layers:
        return [
            BadInput(
                "plan",
                found=f"head_skip {head} + tail_skip {tail} leave no block to train",
                expected=f"less than the model's {layers} blocks",
                remedy="skip fewer blocks",
            )
        ]
    faults, free, end = [], head + 1, layers - tail
    for first, after in runs:
        if not free <= first < after < end:
            faults.append(
                BadInput(
                    "plan.inner_skips",
                    found=f"[{first}, {after}]",
                    expected=f"ascending runs of blocks [first, end) between trained ones: {free} "
                    f"<= first < end < {end}",
                )
            )
        free = after + 1
    return faults


def size_faults(sizes: dict[str, int], multiple: int) -> list[BadInput]:
    """Sizes that the model cannot take.

    Args:
        sizes: where each stands -> pixels.
        multiple: pixels that they must be a multiple of.
    """
    return [
        BadInput(
            where,
            found=f"{value} pixels",
            expected=f"a multiple of {multiple}, the model's downsampling factor",
            remedy=f"{max(1, value // multiple) * multiple} or {-(-value // multiple) * multiple}",
        )
        for where, value in sizes.items()
        if value % multiple
    ]
