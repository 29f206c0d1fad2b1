"""Losses of a tuned model when blocks are skipped, or do not see the text.

Both are measured block by block from kept states, so that no head is computed twice. The images are
noised at the `LEVELS` noise levels of `edge_dit.reference.evaluate.heldout_loss`, and losses are
not weighted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from edge_dit.models.families.family import State
from edge_dit.models.model import Model
from edge_dit.models.subgraph import difference
from edge_dit.progress import bar
from edge_dit.reference.evaluate import LEVELS, Whole
from edge_dit.select.masking import text_masked

UNSEEN = 1_000_000
"""Seed of the first measured noise. `train_full_lora` takes a seed for each step, from 0 on, so
tuning never saw this noise."""


def losses_of_splits(
    model: Model,
    transformer: nn.Module,
    images: list[Whole],
    splits: Sequence[Sequence[int]],
    title: str,
) -> np.ndarray:
    """Losses when all blocks but those of a split are replaced by the base model's residuals.

    Args:
        model: that is tuned.
        transformer: of the model, with a subject's LoRA.
        images: of the subject, encoded.
        splits: numbers of the blocks that stay, ascending, for each split.
        title: of the progress bar.

    Returns:
        float64 [images, splits], mean over noise levels.
    """
    return _mean_losses(model, transformer, images, title, lambda replay: replay.of_splits(splits))


def losses_of_run_tails(
    model: Model, transformer: nn.Module, images: list[Whole], title: str
) -> np.ndarray:
    """Losses when the last m blocks run without their LoRA.

    Args:
        model: that is tuned.
        transformer: of the model, with a subject's LoRA.
        images: of the subject, encoded.
        title: of the progress bar.

    Returns:
        float64 [images, L + 1], mean over noise levels, by m = 0..L.
    """
    return _mean_losses(model, transformer, images, title, Replay.of_run_tails)


def losses_with_masked_text(
    model: Model, transformer: nn.Module, images: list[Whole], title: str
) -> np.ndarray:
    """Losses when the text is masked from the image in the first n blocks, or in the last m.

    Args:
        model: that is tuned.
        transformer: of the model, with a subject's LoRA.
        images: of the subject, encoded.
        title: of the progress bar.

    Returns:
        float64 [images, 2 (L + 1)], mean over noise levels: by n = 0..L, then by m = 0..L.
    """
    return _mean_losses(model, transformer, images, title, Replay.with_masked_text)


def _mean_losses(
    model: Model,
    transformer: nn.Module,
    images: list[Whole],
    title: str,
    measure: Callable[[Replay], list[float]],
) -> np.ndarray:
    """Float64 [images, losses of ``measure``], mean over noise levels."""
    losses: list[float] = []
    with bar(title, LEVELS * len(images)) as advance:
        for number, image in enumerate(images):
            for level in range(LEVELS):
                seed = UNSEEN + LEVELS * number + level
                sigma = (level + 0.5) / LEVELS
                losses += measure(Replay(model, transformer, image, sigma, seed))
                advance()
    return np.array(losses).reshape(len(images), LEVELS, -1).mean(axis=1)


class Replay:
    """One noised image and its states on the way through the tuned model.

    Args:
        model: that is tuned.
        transformer: of the model, with a subject's LoRA.
        image: encoded.
        sigma: noise level in (0, 1].
        seed: of the noise.

    Attributes:
        tuned: the L + 1 states before, between and after the L blocks with LoRA.
    """

    def __init__(
        self, model: Model, transformer: nn.Module, image: Whole, sigma: float, seed: int
    ) -> None:
        self.family, self.transformer, self.grid = model.family, transformer, image.grid
        self.blocks = list(self.family.blocks(transformer).items())
        objective = model.objective
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(image.clean.shape, generator=generator)
        noised = objective.noised(image.clean, noise, sigma)
        timestep = objective.timestep(sigma)
        inputs = self.family.inputs(transformer, noised, timestep, image.prompt, image.grid)
        start, self.cond = self.family.begin(transformer, inputs)
        self.target = objective.target(image.clean, noise)
        self.tuned = self.states_from(0, start)

    def of_splits(self, splits: Sequence[Sequence[int]]) -> list[float]:
        """One loss for each split: its blocks run with LoRA, the base model stands in for others.

        Args:
            splits: numbers of the blocks that run, ascending, for each split.
        """
        with _without_lora(self.transformer):
            base = self.states_from(0, self.tuned[0])
        return [self.loss(self.last_state(split, base)) for split in splits]

    def of_run_tails(self) -> list[float]:
        """L + 1 losses with the last m blocks without LoRA, on the states that reach them."""
        with _without_lora(self.transformer):
            ends = [self.states_from(k, state)[-1] for k, state in enumerate(self.tuned)]
        return [self.loss(state) for state in reversed(ends)]

    def with_masked_text(self) -> list[float]:
        """2 (L + 1) losses with the text masked in the first n blocks, then in the last m."""
        with text_masked(self.family, self.transformer, range(len(self.blocks))):
            masked = self.states_from(0, self.tuned[0])
            # With the text seen by the first k blocks and masked in those after them.
            tails = [self.states_from(k, state)[-1] for k, state in enumerate(self.tuned)]
        heads = [self.states_from(n, state)[-1] for n, state in enumerate(masked)]
        return [self.loss(state) for state in [*heads, *reversed(tails)]]

    def states_from(self, first: int, state: State) -> list[State]:
        """The states before block ``first``, which is ``state``, and after each block from it on.

        Blocks run as they are at the moment, with LoRA or without, and masked or not.
        """
        states = [state]
        for number in range(first, len(self.blocks)):
            states.append(self.after(number, states[-1]))
        return states

    def after(self, number: int, state: State) -> State:
        """The state after a block, as it is at the moment."""
        return self.family.run_block(*self.blocks[number], state, self.cond, self.grid)

    def last_state(self, trained: Sequence[int], base: list[State]) -> State:
        """The state after the last block when only some blocks run.

        Args:
            trained: numbers of the blocks that run, ascending.
            base: the L + 1 states of the base model; a skipped run adds its residual of these.
        """
        state, reached = base[0], 0
        for block in trained:
            state = _skip(state, base[reached], base[block])
            # The states before the first skipped block are known.
            if state is self.tuned[block]:
                state = self.tuned[block + 1]
            else:
                state = self.after(block, state)
            reached = block + 1
        return _skip(state, base[reached], base[-1])

    def loss(self, state: State) -> float:
        """Mean squared error of what the head makes of the state after the last block."""
        output = self.family.head(self.transformer, state.image, self.cond, self.grid)
        return float(torch.nn.functional.mse_loss(self.family.learned(output), self.target))


def _skip(state: State, before: State, after: State) -> State:
    """``state`` plus what skipped blocks add in the base model: ``after - before`` (Eq. 3).

    Args:
        state: that reaches the skipped blocks.
        before, after: states of the base model before and after them.
    """
    if after is before:  # no block is skipped
        return state
    if state is before:  # exactly, where state + (after - before) would round
        return after
    residual = difference(after, before)
    image = state.image + residual.image
    if state.text is None or residual.text is None:
        return State(image)
    return State(image, state.text + residual.text)


@contextmanager
def _without_lora(transformer: nn.Module) -> Iterator[None]:
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
