"""Writes a plan as one HTML page that needs no other file.

The page (report.html.j2) has no scripts and loads nothing: pictures are data: URIs, charts inline
SVG, coloured by CSS variables so that they follow the reader's light or dark setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, inf, isfinite, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edge_dit.app.describe import in_runs
from edge_dit.budget.limits import NO_LIMITS, Limits
from edge_dit.budget.quality import STEPS, Quality
from edge_dit.contract.bank import Crop, Draw
from edge_dit.errors import missing_extra, require
from edge_dit.pictures.dataset import Captioned
from edge_dit.pictures.draws import Drawn, DrawRule
from edge_dit.planning.plan import Plan
from edge_dit.planning.selection import Selection
from edge_dit.planning.split import SplitRequest, choose_split
from edge_dit.store.files import write_atomic
from edge_dit.text import size
from edge_dit_runtime.page.html import STYLE, data_uri

if TYPE_CHECKING:
    from edge_dit.budget.footprint import Measured

TEMPLATE = "report.html.j2"
ROLES = ("frozen weights", "LoRA", "optimizer", "activations", "other")
"""What memory is used for, in the order of the bars."""
LETTERS = "FLOA+"
"""Letter of each role in the bars, in addition to its colour."""
SIGMAS = (0.05, 0.275, 0.5, 0.725, 0.95)
"""Noise levels of the sample patches."""
RATIOS = (0.3, 0.4, 0.5)
"""Shares of skipped blocks that the paper reports (docs/method.md, "Quality on DreamBooth")."""
PICTURES = 2
"""Images that sample patches are drawn from: enough to see what a patch shows."""
WHOLE, THUMBNAIL = 768, 256
"""Longest sides of pictures on the page, pixels."""
NUMBERED = 16
"""Most blocks for which the cells of the heat map have room for a number."""
METHODS = {
    "generation": "pictures were drawn with the text masked from the image in the first n, or the "
    "last m, blocks; the score is their distance, 1 - cos, from pictures drawn without a mask",
    "loss-masked": "the text was masked from the image in the first n, or the last m, blocks; the "
    "score is what that adds to the training loss",
    "loss-frozen": "the first n blocks went without their LoRA, or the last m were replaced by the "
    "base model's residual; the score is what that adds to the training loss",
}
"""How a selection was measured, by `edge_dit.planning.selection.Selection.method`."""


@dataclass(frozen=True)
class Expected:
    """What training the plan with one variant is predicted to take.

    Attributes:
        execution: the `edge_dit.contract.targets.TargetVariant` in words ("onnx:streamed").
        anonymous, file: peak bytes of a training process.
        flash: bytes of bundle and bank.
        seconds: of a step.
    """

    execution: str
    anonymous: int
    file: int
    flash: int
    seconds: float


@dataclass(frozen=True)
class Patch:
    """What a training step sees of an image.

    Attributes:
        sigma: noise level in [0, 1].
        crop: pixels of the image that it is made of.
        pixels: [s_min, s_min, 3] uint8, RGB.
    """

    sigma: float
    crop: Crop
    pixels: np.ndarray


@dataclass(frozen=True)
class Sampled:
    """An image and patches of it.

    Attributes:
        name: the image's file name.
        whole: [H, W, 3] uint8, RGB; the shorter side is s_max.
        patches: one for each noise level, ascending.
    """

    name: str
    whole: np.ndarray
    patches: Sequence[Patch]


@dataclass(frozen=True)
class Page:
    """The content of the page.

    Attributes:
        model: name of the model, for people.
        plan: the job's plan.
        expected: one for each variant that can train the plan.
        budget: what the plan had to fit.
        reasons: sentences: why this plan, what was given up, what more memory would allow.
        selection: the measurement that decided the split, or None.
        memory: title and bytes by role (`ROLES`) of each bar, from `memory_by_role`.
        memory_note: a sentence on what the bars count.
        measured: predictions that were compared with measurements; may be empty.
        machine: the machine of these measurements.
        samples: from `sample_patches`; may be empty.
        quality: the calibration that ``kept`` is by.
        kept: share of full LoRA's gain that the plan is expected to keep; None if the blocks of
            its model were not measured.
    """

    model: str
    plan: Plan
    expected: Sequence[Expected] = ()
    budget: Limits = NO_LIMITS
    reasons: Sequence[str] = ()
    selection: Selection | None = None
    memory: Sequence[tuple[str, Mapping[str, int]]] = ()
    memory_note: str = (
        "What a step needs at least, in float32 with the activations of all trained blocks kept. "
        "The runtime's own memory comes on top; streamed and recomputing layouts need less."
    )
    measured: Sequence[Measured] = ()
    machine: str = ""
    samples: Sequence[Sampled] = ()
    quality: Quality | None = None
    kept: float | None = None


def sample_patches(
    plan: Plan, images: Sequence[Captioned], sigmas: Sequence[float] = SIGMAS
) -> list[Sampled]:
    """Patches of the first `PICTURES` images, cut and resized as in precompute.

    Args:
        plan: its sizes and seed decide the crops.
        images: as read by `edge_dit.pictures.dataset.read_folder`, shorter side ``plan.s_max``.
        sigmas: noise levels in [0, 1].

    Raises:
        BadInput: torch is not installed.
    """
    require("torch", "the patch sampler")
    import torch

    from edge_dit.models.patch_sampler import PatchSampler

    sampler = PatchSampler(plan.crop_rule)
    samples = []
    for image in images[:PICTURES]:
        levels = iter(sigmas)
        rule = DrawRule(
            seed=plan.seed,
            level=lambda _, levels=levels: next(levels),
            pictures=[Drawn(image.size, (0,))],
            crops=plan.crop_rule,
        )
        draws = rule.draws(len(sigmas))
        whole = image.pixels
        pixels = torch.from_numpy(whole).unsqueeze(0)
        patches = []
        for draw in draws:
            patch = sampler(pixels, torch.tensor([draw.sigma]), torch.tensor([draw.u, draw.v]))
            patches.append(_patch(plan, draw, patch.numpy()))
        samples.append(Sampled(image.name, _rgb(whole), patches))
    return samples


def _patch(plan: Plan, draw: Draw, sampled: np.ndarray) -> Patch:
    """What a step sees of a draw.

    Args:
        plan: of the draw.
        draw: that was sampled.
        sampled: its resized crop, [1, 3, side, side] in [-1, 1].
    """
    rule, crop = plan.window_rule, draw.crop
    if rule is None:
        return Patch(draw.sigma, crop, _rgb(sampled[0]))
    window = rule.window(draw)
    top, left = (plan.multiple * start for start in (window.place.top, window.place.left))
    place = Crop(crop.top + top, crop.left + left, plan.s_min)
    return Patch(draw.sigma, place, _rgb(window.latents(sampled)[0]))


def memory_by_role(
    plan: Plan, selection: Selection | None = None
) -> list[tuple[str, dict[str, int]]]:
    """Bars for `Page.memory`: full LoRA at full resolution, the paper's `RATIOS` with the plan's
    patches, and the plan.

    Args:
        plan: of the job; its model's configuration is read.
        selection: of the model; it decides which blocks the ratios skip.

    Raises:
        BadInput: the model folder is gone, or torch is not installed.
    """
    require("torch", "counting memory")
    from edge_dit.budget.cost import Cost, shapes_of

    def by_role(cost: Cost) -> dict[str, int]:
        parts = (cost.frozen_bytes, cost.lora_bytes, cost.optimizer_bytes, cost.activation_bytes)
        return dict(zip(ROLES, (*parts, cost.bank_bytes), strict=True))

    whole, patch = shapes_of(plan)
    every = range(plan.layers)
    bars = [(f"full LoRA, {plan.s_max} px", by_role(whole.cost(every, plan.rank)))]
    for ratio in RATIOS:
        split = choose_split(plan.layers, SplitRequest(skip_ratio=ratio), selection)
        cost = patch.cost(split.trained, plan.rank)
        bars.append((f"paper: {ratio:.0%} skipped, {plan.s_min} px", by_role(cost)))
    return [*bars, ("this plan", by_role(patch.cost(plan.trained, plan.rank, plan.tail)))]


def write_report(path: Path, page: Page) -> None:
    """Write a page to ``path``, whole or not at all.

    Args:
        path: of the .html file.
        page: what it says.

    Raises:
        BadInput: Jinja2 is not installed, or the system does not let us write.
        ValueError: a bar of memory has a role that is none of `ROLES`.
    """
    write_atomic(path, render(page))


def render(page: Page) -> str:
    """The page as HTML. It raises what `write_report` raises, except for writing."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup  # comes with Jinja2
    except ImportError as error:  # it comes with torch
        raise missing_extra("torch", "a report") from error

    environment = Environment(
        loader=PackageLoader("edge_dit.app", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(size=size, runs=in_runs, count=_count, off=_off, ms=_milliseconds)
    selection = page.selection
    return environment.get_template(TEMPLATE).render(
        page=page,
        style=Markup(STYLE),
        plan=page.plan,
        blocks=_blocks(page.plan),
        names=NAMES,
        infinite=inf,
        limited=any(map(isfinite, (page.budget.ram, page.budget.flash, page.budget.seconds))),
        heat=None if selection is None else _heat(selection, page.plan),
        methods=METHODS,
        roles=ROLES,
        letters=LETTERS,
        bars=_bars(page.memory),
        samples=[_sample(sample) for sample in page.samples],
        steps=STEPS,
        scatter=None if page.quality is None else _scatter(page.quality, page.kept),
    )


# ---------------------------------------------------------------- what the template is given


NAMES = {
    "trained": "trained",
    "head": "skipped, head",
    "tail": "skipped, tail",
    "inner": "skipped, between",
}
"""Field of `Blocks` -> its name for people."""


class Blocks(NamedTuple):
    """Numbers of a model's blocks, ascending, by their part in the plan."""

    trained: list[int]
    head: list[int]
    tail: list[int]
    inner: list[int]

    def kinds(self) -> list[str]:
        """The name of each block's field, in the order of the blocks."""
        kind_of = {n: kind for kind in self._fields for n in getattr(self, kind)}
        return [kind_of[number] for number in sorted(kind_of)]


def _blocks(plan: Plan) -> Blocks:
    trained, end = plan.trained, plan.layers - plan.tail_skip
    inner = [number for number in range(plan.head_skip, end) if number not in trained]
    return Blocks(trained, list(range(plan.head_skip)), list(range(end, plan.layers)), inner)


class Cell(NamedTuple):
    """A cell of the heat map: one split.

    Attributes:
        head, tail: numbers of blocks skipped before and after, n and m.
        score: `edge_dit.planning.selection.Selection.score` of the split.
        shade: in [0, 1], from the lowest score to the highest.
        number: the score in the map's unit, or "" if there is no room.
        best: whether no other split of as many blocks scores lower.
        own: whether it is the plan's split.
    """

    head: int
    tail: int
    score: float
    shade: float
    number: str
    best: bool
    own: bool


class Heat(NamedTuple):
    """The heat map.

    Attributes:
        cells: every (n, m) with n + m < L.
        side: side of a cell, in units of the drawing, which is 360 wide.
        ticks: numbers of blocks that label the axes.
        low, high: smallest and largest score.
        unit: unit of the numbers in the cells.
        best: the best split (n*, m*) of k = 1..L - 1 skipped blocks, at index k - 1.
    """

    cells: list[Cell]
    side: float
    ticks: range
    low: float
    high: float
    unit: float
    best: list[tuple[int, int]]


def _heat(selection: Selection, plan: Plan) -> Heat:
    layers = selection.layers
    splits = [split for skipped in range(layers) for split in selection.splits(skipped)]
    best = [selection.best(skipped) for skipped in range(1, layers)]
    scores = [selection.score(*split) for split in splits]
    low, high = min(scores), max(scores)
    largest = max(abs(low), abs(high))
    unit = 10.0 ** (floor(log10(largest)) - 1) if largest else 1.0
    cells = [
        Cell(
            *split,
            score=score,
            shade=(score - low) / (high - low) if high > low else 0.0,
            number=f"{score / unit:.0f}" if layers <= NUMBERED else "",
            best=split in best,
            own=split == (plan.head_skip, plan.tail_skip),
        )
        for split, score in zip(splits, scores, strict=True)
    ]
    step = next(step for step in (1, 2, 5, 10, 20, 50, layers) if layers <= 15 * step)
    return Heat(cells, 320 / layers, range(0, layers, step), low, high, unit, best)


class Dot(NamedTuple):
    """A point of the calibration: where it is in the drawing, its model's number, and its title."""

    x: float
    y: float
    model: int
    title: str


class Scatter(NamedTuple):
    """Measured against predicted shares of full LoRA's gain.

    Attributes:
        dots: one for each measured plan.
        models: their models.
        ticks: percents that label both axes, and where they are on the horizontal one.
        own: where the plan's prediction is on it; None without one.
    """

    dots: list[Dot]
    models: list[str]
    ticks: list[tuple[int, float]]
    own: float | None


def _scatter(quality: Quality, kept: float | None) -> Scatter:
    models = sorted({point.model for point in quality.points})
    shares = [share for p in quality.points for share in (p.kept, p.predicted)]
    lowest = floor(10 * min([*shares, 1.0 if kept is None else kept])) / 10
    highest = max(1.0, *shares)

    def along(share: float) -> float:
        """Place on the horizontal axis; the vertical one is 360 less it."""
        return 40 + 300 * (share - lowest) / (highest - lowest)

    dots = [
        Dot(
            along(p.predicted),
            360 - along(p.kept),
            models.index(p.model),
            f"{p.model}, {p.arm}: {100 * p.kept:.1f} % measured, "
            f"{100 * p.predicted:.1f} % predicted",
        )
        for p in quality.points
    ]
    ticks = [(10 * n, along(n / 10)) for n in range(round(10 * lowest), 11)]
    return Scatter(dots, models, ticks, None if kept is None else along(kept))


class Segment(NamedTuple):
    """A segment of a bar; start and length are percent of the longest bar."""

    role: str
    number: int
    start: float
    length: float


class Bar(NamedTuple):
    """A bar: memory in bytes by role, and how it is drawn."""

    title: str
    by_role: Mapping[str, int]
    total: int
    segments: list[Segment]


def _bars(memory: Sequence[tuple[str, Mapping[str, int]]]) -> list[Bar]:
    for title, by_role in memory:
        if unknown := sorted(set(by_role) - set(ROLES)):
            raise ValueError(f"{title}: roles {unknown}, expected some of {ROLES}")
    longest = max((sum(by_role.values()) for _, by_role in memory), default=0) or 1
    bars = []
    for title, by_role in memory:
        segments, start = [], 0.0
        for number, role in enumerate(ROLES):
            length = 100 * by_role.get(role, 0) / longest
            segments.append(Segment(role, number, start, length))
            start += length
        bars.append(Bar(title, by_role, sum(by_role.values()), segments))
    return bars


def _sample(sample: Sampled) -> dict[str, Any]:
    height, width, _ = sample.whole.shape
    return {
        "name": sample.name,
        "height": height,
        "width": width,
        "whole": data_uri(sample.whole, WHOLE),
        "patches": [(patch, data_uri(patch.pixels, THUMBNAIL)) for patch in sample.patches],
    }


def _rgb(pixels: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8 of [3, H, W] in [-1, 1]."""
    levels = np.round((pixels.transpose(1, 2, 0) + 1) * 127.5)
    return np.clip(levels, 0, 255).astype(np.uint8)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _off(predicted: float, measured: float) -> str:
    """How far a prediction is from what was measured."""
    return f"{predicted / measured - 1:+.1%}" if measured else "–"


def _milliseconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
