"""A draw on its way: picture, patch, latents, noise, state; then block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, TypeAdapter

from edge_dit.contract import bank
from edge_dit.contract.bundle import REMEDY, Bundle
from edge_dit.contract.names import (
    COND,
    ENTRY,
    STATE,
    STORED,
    TAIL_RESIDUAL,
    TARGET,
    WEIGHT,
    WEIGHT_MASK,
    Tail,
    residual_names,
)
from edge_dit.contract.noise import NOISE, normal
from edge_dit.contract.objective import weight_of
from edge_dit.contract.split import borders, inner_runs, trained_blocks
from edge_dit.pictures.dataset import Captioned
from edge_dit.pictures.masks import of_tokens
from edge_dit.pictures.sizes import PatchSizes
from edge_dit.pictures.window import Window
from edge_dit.store.documents import validated
from edge_dit_runtime.loop.parts import TARGET as ONNX
from edge_dit_runtime.loop.parts import Parts
from edge_dit_runtime.session import open_sampler
from edge_dit_runtime.sessions.trainer import Tensors


class Planned(PatchSizes):
    """The part of a manifest's plan that draws are made by."""

    layers: int
    head_skip: int
    tail_skip: int
    inner_skips: list[tuple[int, int]] = Field(default_factory=list)
    tail: Tail = STORED
    draws: int
    seed: int
    bank_dtype: Literal["float32", "float16"] = "float32"
    weighted: bool = False
    masked: bool = False
    prior_share: float = 0.0

    @property
    def trained(self) -> list[int]:
        """Numbers of the trained blocks, ascending."""
        return trained_blocks(self.layers, self.head_skip, self.tail_skip, self.inner_skips)


def planned_of(bundle: Bundle) -> Planned:
    """The plan in a manifest.

    Raises:
        BadInput: it lacks what draws are made by.
    """
    return validated(bundle.folder, TypeAdapter(Planned), bundle.manifest.plan, REMEDY)


@dataclass(frozen=True)
class Start:
    """A draw before the first block: state by `STATE`, conditioning by batch names, target, weight
    of its loss, and the window that is kept of it, if patches are windows.
    """

    state: Tensors
    cond: Tensors
    target: np.ndarray
    weight: float | np.ndarray | None
    window: Window | None = None


class Starts:
    """Makes the tensors of draws.

    Args:
        parts: of the bundle.
        images: by number.
        prompts: number in the bank's index -> number in the bundle.
    """

    def __init__(
        self, parts: Parts, images: Sequence[Captioned], prompts: Mapping[int, int]
    ) -> None:
        self.parts, self.images, self.prompts = parts, images, prompts
        self.plan = planned_of(parts.bundle)
        self._sampler = open_sampler(parts.bundle, ONNX)
        self.shape = parts.facts.latents.shape(self.plan.passing // parts.facts.latents.factor)

    def encode(self, draw: bank.Draw) -> np.ndarray:
        """Clean latents of a draw's patch."""
        patch = self._patch(self.images[draw.image].pixels[None], draw)
        return self.parts.encode(patch, draw.seed)

    def enter(self, draw: bank.Draw, clean: np.ndarray) -> Start:
        """Add a draw's noise to its clean latents, and run the model up to its first block."""
        objective, noise = self.parts.objective, normal(draw.seed, NOISE, clean.shape)
        noised = np.asarray(objective.noised(clean, noise, draw.sigma), np.float32)
        timestep = objective.timestep(draw.sigma)
        state, cond = self.parts.begin(noised, timestep, self.prompts[draw.prompt])
        target = np.asarray(objective.target(clean, noise), np.float32)
        rule = self.plan.window_rule
        window = rule.window(draw) if rule else None
        return Start(state, cond, target, self._weight(draw, target.shape), window)

    def _weight(self, draw: bank.Draw, target: tuple[int, ...]) -> float | np.ndarray | None:
        """Weight of a draw's loss, or of each token's where draws have masks.

        Args:
            draw: which.
            target: shape of its target.
        """
        picture, plan = self.images[draw.image], self.plan
        weight = weight_of(self.parts.objective.weight(draw.sigma), picture.weight, plan.weighted)
        if not plan.masked:
            return weight
        patch = np.ones((plan.passing, plan.passing), np.float32)
        if picture.mask is not None:
            whole = np.repeat(picture.mask()[None, None], 3, axis=1)
            patch = self._patch(whole, draw)[0, 0]
        mask = of_tokens(patch, plan.passing_grid, target)
        return mask * np.float32(1.0 if weight is None else weight)

    def _patch(self, pixels: np.ndarray, draw: bank.Draw) -> np.ndarray:
        """The crop of a draw, [1, 3, passing, passing], of a picture [1, 3, H, W]."""
        sigma, place = np.array([draw.sigma], np.float32), np.array([draw.u, draw.v], np.float32)
        return self._sampler(pixels, sigma, place)

    def per_prompt(self) -> list[Tensors]:
        """Conditioning that depends on the prompt alone, of every prompt of the index."""
        names = self.shared
        blank = np.zeros(self.shape, np.float32)
        begun = [self.parts.begin(blank, 0.0, number)[1] for number in self.prompts.values()]
        return [{name: cond[name] for name in names} for cond in begun]

    @property
    def shared(self) -> list[str]:
        """Names of the batch tensors that depend on the prompt alone."""
        return [COND + name for name in self.parts.facts.per_prompt]

    def tensors(
        self, starts: Sequence[Start], advance: Callable[..., None] = lambda _share: None
    ) -> list[Tensors]:
        """The batch tensors of draws, with those of their prompts.

        Args:
            starts: the draws, before the first block.
            advance: is told how many draws were done, in fractions.
        """
        plan = self.plan
        wanted = borders(plan.layers, plan.trained, plan.tail == STORED)
        states, conds = [start.state for start in starts], [start.cond for start in starts]
        kept: list[dict[int, Tensors]] = [{} for _ in starts]
        last = max(wanted)
        for number in range(last + 1):
            if number in wanted:
                for of_draw, state in zip(kept, states, strict=True):
                    of_draw[number] = state
            if number < last:
                states = self.parts.through_base(self.parts.facts.blocks[number], states, conds)
            advance(len(starts) / (last + 1))
        return [self._batch(*pair) for pair in zip(starts, kept, strict=True)]

    def _batch(self, start: Start, states: Mapping[int, Tensors]) -> Tensors:
        plan, batch = self.plan, dict(states[self.plan.head_skip])
        for after, first in inner_runs(plan.trained).items():
            names = dict(zip(STATE, residual_names(first), strict=True))
            moved = states[after]
            batch |= {name: moved[n] - states[first][n] for n, name in names.items() if n in moved}
        read = set(self.parts.bundle.manifest.names("batch"))
        batch |= {name: value for name, value in start.cond.items() if name in read}
        batch[TARGET] = start.target
        if plan.tail == STORED:
            end = states[plan.layers - plan.tail_skip]
            batch[TAIL_RESIDUAL] = states[plan.layers][ENTRY] - end[ENTRY]
        if isinstance(start.weight, np.ndarray):
            batch[WEIGHT_MASK] = start.weight
        elif start.weight is not None:
            batch[WEIGHT] = np.array([start.weight], np.float32)
        return start.window.cut(batch, self.parts.facts.placed) if start.window else batch
