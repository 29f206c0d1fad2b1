"""Draws of an arm: fresh ones, and banks of them with the base model's states."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from arms import ARMS, CROPS, Arm
from runs import Run, model_for, pipeline_of, plan_for, subject_of
from side_by_side import joined
from torch import Tensor

from edge_dit.contract.bank import Draw
from edge_dit.contract.names import STORED, Tail
from edge_dit.contract.noise import NOISE, POSTERIOR
from edge_dit.models.families.family import Grid, State
from edge_dit.models.patch_sampler import PatchSampler
from edge_dit.models.subgraph import as_batch, difference, inner_runs
from edge_dit.pictures.crop import CropRule
from edge_dit.pictures.draws import DrawRule
from edge_dit.planning.plan import Plan
from edge_dit.reference.precompute import normal_of


@dataclass(frozen=True)
class Through:
    """A draw on its way: the states entering each block so far, and what goes with them."""

    states: list[State]
    cond: dict[str, Tensor]
    target: Tensor
    weight: float | None


def draws_of(run: Run, count: int) -> list[Draw]:
    plan, train = plan_for(run), subject_of(run.job, run.subject).train
    sizes = [image.size for image in train]
    level, prompts = model_for(run.job).objective.level, list(range(len(train)))
    return DrawRule(plan.seed, level, prompts, sizes, plan.crop_rule).draws(count)


@torch.no_grad()
def begin(run: Run, draw: Draw) -> Through:
    """A draw as it enters the first block (docs/method.md, Eq. 1)."""
    plan, pipeline, arm = plan_for(run), pipeline_of(run.job), ARMS[run.arm]
    subject, model = subject_of(run.job, run.subject), model_for(run.job)
    family, objective = model.family, model.objective
    chance = float(np.random.default_rng([draw.seed, 1]).random())
    share = 1.0 if arm.whole else CROPS[arm.crop](draw.sigma, chance)
    pixels = torch.from_numpy(subject.train[draw.image].pixels).unsqueeze(0)
    sampler = PatchSampler(replace(plan.crop_rule, s_min=side_of(arm, plan)))
    patch = sampler(pixels, torch.tensor([share]), torch.tensor([draw.u, draw.v]))
    posterior = functools.partial(normal_of, draw.seed, POSTERIOR)
    clean = family.encode_image(pipeline.vae, patch, posterior)
    noise = normal_of(draw.seed, NOISE, tuple(clean.shape))
    inputs = family.inputs(
        pipeline.transformer,
        objective.noised(clean, noise, draw.sigma),
        objective.timestep(draw.sigma),
        subject.prompts[draw.image],
        grid_of(side_of(arm, plan), plan),
    )
    state, cond = family.begin(pipeline.transformer, inputs)
    return Through([state], cond, objective.target(clean, noise), objective.weight(draw.sigma))


def side_of(arm: Arm, plan: Plan) -> int:
    """Pixels of what passes the first blocks."""
    return plan.s_max if arm.whole else plan.s_min


def grid_of(side: int, plan: Plan) -> Grid:
    """Token rows and columns of a square of ``side`` pixels."""
    return (side // plan.multiple,) * 2


@functools.lru_cache(maxsize=16)
@torch.no_grad()
def bank_of(
    job: Path, subject: Path, seed: int, steps: int, crop: str, patch: float
) -> list[Through]:
    """A bank's draws with the base model's states around every block: what any arm of this crop and
    patch that skips blocks may store (docs/method.md, Eq. 3).
    """
    like = next(
        n for n, arm in ARMS.items() if arm.banked and (arm.crop, arm.patch) == (crop, patch)
    )
    run = Run(job, like, subject, seed, steps)
    plan = plan_for(run)
    family = model_for(job).family
    drawn, grid = draws_of(run, plan.draws), grid_of(side_of(ARMS[like], plan), plan)
    draws = [begin(run, draw) for draw in drawn]
    for block in family.blocks(pipeline_of(job).transformer).values():
        for some in (draws[first : first + 16] for first in range(0, len(draws), 16)):
            before = [through.states[-1]._asdict() for through in some]
            cond = joined([through.cond for through in some])
            after = family.run_block(block, State(**joined(before)), cond, grid)
            for row, through in enumerate(some):
                part = [None if v is None else v[row : row + 1].clone() for v in after]
                through.states.append(State(*part))
    if crop == "window":
        return [window(one, draw, grid, plan.grid) for one, draw in zip(draws, drawn, strict=True)]
    return draws


def window(through: Through, draw: Draw, whole: Grid, patch: Grid) -> Through:
    """What a window of a whole picture's tokens holds of a draw, at the draw's place.

    Args:
        through: of the whole picture.
        draw: its u and v say where the window is.
        whole: token rows and columns of the picture, a square.
        patch: those of the window, a square.
    """
    place = CropRule(patch[0], whole[0], 1).crop(0.0, draw.u, draw.v, *whole)
    rows, columns = (slice(first, first + place.side) for first in (place.top, place.left))

    def cut(value: Tensor) -> Tensor:
        """Tokens [1, text + image, ...]: all of the text's, and the image's that are inside."""
        count = whole[0] * whole[1]
        text, image = value.split([value.shape[1] - count, count], 1)
        return torch.cat([text, image.unflatten(1, whole)[:, rows, columns].flatten(1, 2)], 1)

    states = [State(cut(state.image), state.text) for state in through.states]
    cond = {
        name: cut(value[None])[0] if name.startswith("rope_") else value
        for name, value in through.cond.items()
    }
    target = through.target
    if target.dim() == 4:  # latents [1, C, h, w], not tokens
        latents = target.shape[2] // whole[0]
        target = target.unflatten(3, (-1, latents)).unflatten(2, (-1, latents))
        target = target[:, :, rows, :, columns].flatten(4, 5).flatten(2, 3)
    else:
        target = cut(target)
    return Through(states, cond, target, through.weight)


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
    return as_batch(entry, kept, through.cond, through.target, through.weight, inner)
