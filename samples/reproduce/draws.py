"""Draws of an arm: fresh ones, and banks of them with the base model's states."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import ARMS, CROPS, Arm
from context import around, surroundings_of
from runs import Run, model_for, pipeline_of, plan_for, subject_of
from side_by_side import joined
from torch import Tensor

from edge_dit.contract.bank import Crop, Draw
from edge_dit.contract.names import STORED, Tail
from edge_dit.contract.noise import NOISE, POSTERIOR
from edge_dit.models.families.family import Grid, State
from edge_dit.models.patch_sampler import PatchSampler
from edge_dit.models.subgraph import as_batch, difference, inner_runs
from edge_dit.pictures.crop import CropRule
from edge_dit.pictures.draws import Drawn, DrawRule
from edge_dit.pictures.masks import of_tokens
from edge_dit.pictures.window import Window, WindowRule, with_text
from edge_dit.planning.plan import Plan
from edge_dit.reference.precompute import normal_of


@dataclass(frozen=True)
class Through:
    """A draw on its way: the states entering each block so far, and what goes with them; its noise
    level; and what blocks are given of what is around a window, as conditioning.
    """

    states: list[State]
    cond: dict[str, Tensor]
    target: Tensor
    weight: float | Tensor | None
    sigma: float = 0.5
    heard: dict[str, Tensor] = field(default_factory=dict)


def draws_of(run: Run, count: int) -> list[Draw]:
    plan, train = plan_for(run), subject_of(run.job, run.subject).train
    sizes = [image.size for image in train]
    level = model_for(run.job).objective.level
    pictures = [Drawn(size, (number,)) for number, size in enumerate(sizes)]
    return DrawRule(plan.seed, level, pictures, plan.crop_rule).draws(count)


@torch.no_grad()
def begin(run: Run, draw: Draw) -> Through:
    """A draw as it enters the first block (docs/method.md, Eq. 1)."""
    plan, pipeline, arm = plan_for(run), pipeline_of(run.job), ARMS[run.arm]
    subject, model = subject_of(run.job, run.subject), model_for(run.job)
    family, objective = model.family, model.objective
    chance = float(np.random.default_rng([draw.seed, 1]).random())
    share = 1.0 if arm.whole else CROPS[arm.crop](draw.sigma, chance)
    side = side_of(arm, plan, draw.sigma)
    rule = replace(plan.crop_rule, s_min=side)
    pixels = subject.train[draw.image].pixels
    # A picture that no place is chosen in is encoded once.
    once = share == 1.0 and pixels.shape[1:] == (plan.s_max,) * 2
    encode, place = (_moments, (0.0, 0.0)) if once else (_moments.__wrapped__, (draw.u, draw.v))
    moments = encode(run.job, run.subject, draw.image, rule, share, place)
    posterior = functools.partial(normal_of, draw.seed, POSTERIOR)
    clean = family.clean(pipeline.vae, *moments, posterior)
    noise = normal_of(draw.seed, NOISE, tuple(clean.shape))
    inputs = family.inputs(
        pipeline.transformer,
        objective.noised(clean, noise, draw.sigma),
        objective.timestep(draw.sigma),
        subject.prompts[draw.image],
        grid_of(side, plan),
    )
    if arm.told:
        inputs["img_ids"] = told(draw.crop, grid_of(side, plan), plan.multiple)
    state, cond = family.begin(pipeline.transformer, inputs)
    weight = objective.weight(draw.sigma)
    if arm.emphasis:
        weight = (weight or 1.0) * (1 + arm.emphasis) * draw.sigma**arm.emphasis
    return Through([state], cond, objective.target(clean, noise), weight, draw.sigma)


@functools.lru_cache(maxsize=256)
def _moments(
    job: Path, folder: Path, image: int, rule: CropRule, share: float, place: tuple[float, float]
) -> tuple[Tensor, Tensor | None]:
    """`Family.moments` of a training picture's crop.

    Args:
        job: of the model.
        folder: of the subject.
        image: number of the picture.
        rule: of the crop.
        share: (side - s_min) / (s_max - s_min).
        place: u and v.
    """
    pixels = torch.from_numpy(subject_of(job, folder).train[image].pixels).unsqueeze(0)
    patch = PatchSampler(rule)(pixels, torch.tensor([share]), torch.tensor(place))
    return model_for(job).family.moments(pipeline_of(job).vae, patch)


def told(crop: Crop, grid: Grid, multiple: int) -> Tensor:
    """FLUX's position ids [tokens, 3] of a crop's tokens, in tokens of the whole picture: each at
    the middle of what it shows.
    """
    axes = [
        (start + (torch.arange(count) + 0.5) * crop.side / count) / multiple - 0.5
        for start, count in zip((crop.top, crop.left), grid, strict=True)
    ]
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([torch.zeros(grid), rows, columns], -1).reshape(-1, 3)


def side_of(arm: Arm, plan: Plan, sigma: float = 1.0) -> int:
    """Pixels of what passes the first blocks at a noise level."""
    if arm.small and sigma < 0.5:
        return round(arm.small * plan.s_max / plan.multiple) * plan.multiple
    return plan.s_max if arm.whole else plan.s_min


def grid_of(side: int, plan: Plan) -> Grid:
    """Token rows and columns of a square of ``side`` pixels."""
    return (side // plan.multiple,) * 2


SPREAD = 4
"""Stream of a draw's seed that says which tokens of a spread patch are kept."""
TOGETHER = 16
"""Draws that pass the blocks in one batch."""


def bank_of(run: Run, hears: Sequence[int] = ()) -> list[Through]:
    """The draws of a run's bank, with the base model's states around every block: what it may store
    (docs/method.md, Eq. 3).

    Args:
        run: whose.
        hears: numbers of the blocks that hear what is outside of a window.
    """

    def decides(arm: Arm) -> tuple:
        return (
            arm.crop,
            arm.patch,
            arm.small,
            arm.told,
            arm.emphasis,
            arm.draws,
            arm.margin,
            arm.cell,
            arm.context,
        )

    mine = decides(ARMS[run.arm])
    like = next(name for name, arm in ARMS.items() if arm.banked and decides(arm) == mine)
    # Banks of several draws a step are large, and no two arms share one.
    make = _bank if ARMS[run.arm].draws == 1 else _bank.__wrapped__
    return make(replace(run, arm=like), tuple(hears))


@functools.lru_cache(maxsize=16)
def _bank(run: Run, hears: tuple[int, ...]) -> list[Through]:
    arm, plan = ARMS[run.arm], plan_for(run)
    drawn = draws_of(run, plan.draws)
    same_size: dict[int, list[int]] = {}
    for number, draw in enumerate(drawn):
        same_size.setdefault(side_of(arm, plan, draw.sigma), []).append(number)
    bank: dict[int, Through] = {}
    for side, numbers in same_size.items():
        for first in range(0, len(numbers), TOGETHER):
            some = numbers[first : first + TOGETHER]
            draws = [drawn[number] for number in some]
            passed = _passed(run, draws, grid_of(side, plan), hears)
            bank |= dict(zip(some, passed, strict=True))
    return [bank[number] for number in range(len(drawn))]


@torch.no_grad()
def _passed(run: Run, drawn: Sequence[Draw], grid: Grid, hears: tuple[int, ...]) -> list[Through]:
    """Draws of one size through all blocks; of windows, what is within."""
    arm, plan, family = ARMS[run.arm], plan_for(run), model_for(run.job).family
    draws = [begin(run, draw) for draw in drawn]
    cond = None if arm.told else joined([through.cond for through in draws])
    rule, way = WindowRule(plan.grid[0], grid[0]), surroundings_of(family, arm) if hears else None
    blocks = family.blocks(pipeline_of(run.job).transformer)
    for number, (name, block) in enumerate(blocks.items()):
        with ExitStack() as stack:
            seen = stack.enter_context(way.watch(block)) if way and number in hears else None
            if cond is None:  # positions differ from draw to draw
                after = [
                    family.run_block(name, block, through.states[-1], through.cond, grid)
                    for through in draws
                ]
            else:
                before = State(**joined([through.states[-1]._asdict() for through in draws]))
                both = family.run_block(name, block, before, cond, grid)
                after = [
                    State(*[None if v is None else v[row : row + 1].clone() for v in both])
                    for row in range(len(draws))
                ]
        for row, (through, draw, state) in enumerate(zip(draws, drawn, after, strict=True)):
            through.states.append(state)
            if way and seen is not None:
                found = around(way, arm, block, seen, row, rule.window(draw))
                through.heard.update({f"{what}.{name}": value for what, value in found.items()})
    if arm.crop == "window":
        cuts: list[Window | Spread] = [rule.window(draw) for draw in drawn]
    elif arm.crop == "spread":
        cuts = [spread(draw, rule) for draw in drawn]
    else:
        return draws
    return [cut(one, kept, rule, arm.margin) for one, kept in zip(draws, cuts, strict=True)]


@dataclass(frozen=True)
class Spread:
    """Tokens of a picture that are not neighbours.

    Attributes:
        numbers: which, ascending, row by row of the cells that they are from.
        side: token rows, and columns, of the picture.
    """

    numbers: np.ndarray
    side: int

    def tokens(self, value: Any, axis: int = 1) -> Any:
        """As `Window.tokens`."""
        return with_text(value, self.numbers, self.side**2, axis)


def spread(draw: Draw, rule: WindowRule) -> Spread:
    """One token of each of the ``rule.patch``^2 cells of a picture, by the draw's seed."""
    each = rule.side // rule.patch
    offsets = np.random.default_rng([draw.seed, SPREAD]).integers(
        each, size=(2, rule.patch, rule.patch)
    )
    starts = np.arange(rule.patch) * each
    rows, columns = starts[:, None] + offsets[0], starts + offsets[1]
    return Spread((rows * rule.side + columns).ravel(), rule.side)


def cut(through: Through, kept: Window | Spread, rule: WindowRule, margin: int = 0) -> Through:
    """What a draw of a whole picture has of some of its tokens.

    Args:
        through: of the whole picture.
        kept: the tokens.
        rule: of the windows.
        margin: tokens from a window's edge, where that is not the picture's, whose loss does not
            count.
    """
    weight = through.weight
    states = [State(kept.tokens(state.image), state.text) for state in through.states]
    cond = {
        name: kept.tokens(value, 0) if name.startswith("rope_") else value
        for name, value in through.cond.items()
    }
    tokens = through.target.dim() == 3
    if tokens or isinstance(kept, Spread):
        target = kept.tokens(through.target)
    else:
        target = kept.latents(through.target)
    if margin and isinstance(kept, Window):
        inner = of_tokens(inside(kept, margin), (rule.patch,) * 2, target.shape)
        weight = torch.from_numpy(inner) * (1.0 if weight is None else weight)
    return replace(through, states=states, cond=cond, target=target, weight=weight)


def inside(kept: Window, margin: int) -> np.ndarray:
    """1 for the tokens of a window that are further than a margin from its edge, or near one that
    is the picture's; 0 for the others: [side, side] float32.
    """

    def along(start: int) -> np.ndarray:
        side = kept.place.side
        at = np.arange(side)
        far = (at >= margin) | (start == 0)
        return far & ((at < side - margin) | (start + side == kept.side))

    rows, columns = along(kept.place.top), along(kept.place.left)
    return (rows[:, None] & columns).astype(np.float32)


def stored(
    through: Through, running: list[int], residuals: bool, kind: Tail = STORED
) -> dict[str, Tensor]:
    """What a bank keeps of a draw of which the blocks ``running`` run; without residuals a state
    passes the other blocks as it is, leading ones too. A tail that is not stored has none.
    """
    states, last = through.states, running[-1] + 1
    entry = states[running[0]] if len(states) > 1 and residuals else states[0]
    tail = torch.zeros_like(entry.image)
    if residuals and last < len(states):
        tail = states[-1].image - states[last].image
    runs = inner_runs(running).items()
    inner = {
        first: difference(states[behind if residuals else first], states[first])
        for behind, first in runs
    }
    kept = tail if kind == STORED else None
    cond = {**through.cond, **through.heard}
    return as_batch(entry, kept, cond, through.target, through.weight, inner)
