"""Fill a bank: what the frozen blocks contribute to each draw (docs/method.md, Eq. 1 and Eq. 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from edge_dit.cluster.pool import Pool
from edge_dit.contract import bank
from edge_dit.contract.names import COND, STORED
from edge_dit.contract.noise import NOISE, POSTERIOR, normal
from edge_dit.contract.objective import weight_of
from edge_dit.contract.split import borders, inner_runs
from edge_dit.models.checkpoint import Checkpoint
from edge_dit.models.families.family import Conditioning, Grid, Prompt, State
from edge_dit.models.model import Model
from edge_dit.models.patch_sampler import PatchSampler
from edge_dit.models.pipeline import load_pipeline
from edge_dit.models.quantize import round_autoencoder
from edge_dit.models.subgraph import as_batch, difference
from edge_dit.pictures.dataset import Captioned
from edge_dit.pictures.draws import BankRequest, bank_index
from edge_dit.pictures.filling import fill
from edge_dit.pictures.masks import of_tokens
from edge_dit.pictures.window import Window, WindowRule
from edge_dit.planning.plan import Plan, model_of
from edge_dit.reference.eager import blank_batch


def precompute(
    plan: Plan, images: list[Captioned], folder: Path, pool: Pool | None = None
) -> bank.Index:
    """Write the bank of a plan, or finish one that was stopped; its index.

    Per draw: crop and resize (Eq. 1), encode, add noise, run the frozen model, and keep the entry
    state, the residuals (Eq. 3), the conditioning and the target. The same plan and images give the
    same bytes. Only one block of the transformer is in memory at a time.

    Args:
        plan: from `edge_dit.planning.make.make_plan`.
        images: from `edge_dit.pictures.dataset.read_folder`, shorter side ``plan.s_max``.
        folder: where the bank goes.
        pool: a cluster that computes the draws, a shard a task. Its machines see the model and the
            pictures at the same paths.

    Raises:
        BadInput: the folder holds another bank; the model is damaged or not the plan's; or pictures
            that are drawn cannot be decoded, which is found before any draw is computed.
    """
    model = model_of(plan)
    index = plan_index(plan, model, images, blank_batch(plan, model))
    maker: Any = partial(_maker, plan, index, images)
    if pool is not None:
        maker = partial(_ClusterMaker, pool, partial(maker, check=True), index, folder)
    fill(folder, index, images, {COND + name for name in plan.per_prompt(model.family)}, maker)
    return index


def _maker(plan: Plan, index: bank.Index, images: list[Captioned], check: bool = False) -> _Maker:
    """What makes draws: encoders are loaded, prompts encoded.

    Args:
        plan: of the bank.
        index: of the bank.
        images: by number.
        check: whether the model is the plan's: another process may have found another one.
    """
    model = model_of(plan, check)
    checkpoint = model.checkpoint(plan.held)
    skeleton = checkpoint.skeleton(outside=False)
    prompts, numbered = dict(enumerate(index.prompts)), dict(enumerate(images))
    source = source_of(plan, model, encoders_of(model, skeleton), prompts, numbered)
    return _Maker(plan, index, checkpoint, replace(source, listed=index.images))


@dataclass(frozen=True)
class _Maker:
    """Makes draws with torch, see `edge_dit.pictures.filling.Maker`."""

    plan: Plan
    index: bank.Index
    checkpoint: Checkpoint
    source: Source

    def per_prompt(self) -> list[Mapping[str, np.ndarray]]:
        with self.checkpoint.outside(self.source.skeleton):
            return self.source.per_prompt(
                self.plan.per_prompt(self.source.model.family), self.plan.text_tokens
            )

    def draws(
        self, numbers: Sequence[int], advance: Callable[..., None]
    ) -> Iterator[dict[str, np.ndarray]]:
        with self.checkpoint.outside(self.source.skeleton):
            starts = [self.source.start(self.index.draws[number]) for number in numbers]
        kept = passed(self.plan, self.checkpoint, starts, advance)
        tensors = partial(tensors_of, self.plan, self.source, self.checkpoint.names)
        if not any(start.prior for start in starts):
            return map(tensors, starts, kept)
        with self.checkpoint.outside(self.source.skeleton):  # a prior draw's target is predicted
            return iter([*map(tensors, starts, kept)])


@dataclass
class _ClusterMaker:
    """Makes draws on a cluster, see `edge_dit.pictures.filling.Maker`: a shard a task.

    Attributes:
        pool: the cluster.
        opener: opens a `_Maker` there.
        index: of the bank.
        folder: of the bank; its missing shards are asked for ahead of their turn.
    """

    pool: Pool
    opener: Callable[[], _Maker]
    index: bank.Index
    folder: Path
    _shards: Iterator[list[dict[str, np.ndarray]]] | None = None

    def per_prompt(self) -> list[Mapping[str, np.ndarray]]:
        (stored,) = self.pool.map(self.opener, _prompts_of, [None])
        return stored

    def draws(
        self, numbers: Sequence[int], advance: Callable[..., None]
    ) -> Iterator[dict[str, np.ndarray]]:
        if self._shards is None:
            members = map(self.index.members, bank.missing_shards(self.folder, self.index))
            self._shards = self.pool.map(self.opener, _stored_draws, members)
        made = next(self._shards)
        advance(len(numbers))
        return iter(made)


def _prompts_of(maker: _Maker, _: None) -> list[Mapping[str, np.ndarray]]:
    return maker.per_prompt()


def _stored_draws(maker: _Maker, numbers: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """Draws as a bank stores them: what the prompt alone decides stays where it was computed."""
    once = {COND + name for name in maker.plan.per_prompt(maker.source.model.family)}
    draws = maker.draws(numbers, lambda *_: None)
    return [
        bank.narrowed({n: v for n, v in draw.items() if n not in once}, maker.index.dtype)
        for draw in draws
    ]


def plan_index(
    plan: Plan, model: Model, images: list[Captioned], blank: dict[str, Tensor]
) -> bank.Index:
    """The index of a plan's bank.

    Args:
        plan: of the bank.
        model: of the plan.
        images: from `edge_dit.pictures.dataset.read_folder`.
        blank: a draw of the plan's shapes.
    """
    bytes_each = sum(4 * value.numel() for value in blank.values()) * plan.passing_factor
    asked = BankRequest(
        plan.identity(),
        plan.draws,
        plan.seed,
        plan.crop_rule,
        plan.bank_dtype,
        bytes_each,
        plan.prior_share,
    )
    return bank_index(asked, images, model.objective.level)


# ---------------------------------------------------------------- draws before the first block


UNLISTED = bank.Listed("", "")
"""Stands for a picture that the index of a damaged bank lacks."""


class Start(NamedTuple):
    """A draw before the first block, or before a later one: state, conditioning, target, weight of
    its loss or of each token's, whether the base model's prediction takes the target's place, and
    the window that is kept of it, if patches are windows.
    """

    state: State
    cond: Conditioning
    target: Tensor
    weight: float | Tensor | None
    prior: bool = False
    window: Window | None = None


@dataclass(frozen=True)
class Source:
    """What all draws are made from.

    Attributes:
        model: of the plan.
        skeleton: its transformer, blocks on the meta device.
        vae: the autoencoder; None where no image is encoded.
        sampler: cuts patches out of images.
        grid: token rows and columns of what passes the frozen blocks.
        images: as read, by number.
        prompts: encoded, by number in the bank's index.
        tile: side of the tiles that patches are encoded in, pixels; None for whole patches.
        weighted: whether losses are weighed by the pictures' weights.
        masked: whether they are by the pictures' masks too.
        listed: the pictures in the bank's index, by number.
        windows: size and place of windows, if patches are windows.
    """

    model: Model
    skeleton: nn.Module
    vae: nn.Module | None
    sampler: PatchSampler
    grid: Grid
    images: Mapping[int, Captioned]
    prompts: Mapping[int, Prompt]
    tile: int | None = None
    weighted: bool = False
    masked: bool = False
    listed: Sequence[bank.Listed] = ()
    windows: WindowRule | None = None

    @torch.no_grad()
    def start(self, draw: bank.Draw) -> Start:
        """Cut and encode the patch of a draw, then `enter`."""
        pixels = torch.from_numpy(self.images[draw.image].pixels).unsqueeze(0)
        patch = self.sampler(pixels, torch.tensor([draw.sigma]), torch.tensor([draw.u, draw.v]))
        family, posterior = self.model.family, partial(normal_of, draw.seed, POSTERIOR)
        return self.enter(draw, family.encode_image(self.vae, patch, posterior, self.tile))

    @torch.no_grad()
    def enter(self, draw: bank.Draw, clean: Tensor) -> Start:
        """Add a draw's noise to its clean latents, and run the model up to its first block."""
        family, objective = self.model.family, self.model.objective
        noise = normal_of(draw.seed, NOISE, tuple(clean.shape))
        inputs = family.inputs(
            self.skeleton,
            objective.noised(clean, noise, draw.sigma),
            objective.timestep(draw.sigma),
            self.prompts[draw.prompt],
            self.grid,
        )
        state, cond = family.begin(self.skeleton, inputs)
        listed = self.listed[draw.image] if draw.image < len(self.listed) else UNLISTED
        target = objective.target(clean, noise)
        weight = weight_of(objective.weight(draw.sigma), listed.weight, self.weighted)
        if self.masked:
            mask = of_tokens(self._mask(draw, listed), self.grid, target.shape)
            weight = torch.from_numpy(mask) * (1.0 if weight is None else weight)
        window = self.windows.window(draw) if self.windows else None
        return Start(state, cond, target, weight, listed.prior, window)

    def _mask(self, draw: bank.Draw, listed: bank.Listed) -> np.ndarray:
        """The mask of a draw's crop, of its resized side, float32 in [0, 1]."""
        side = self.sampler.rule.s_min
        picture = self.images.get(draw.image)
        if not listed.mask or picture is None or picture.mask is None:
            return np.ones((side, side), np.float32)
        whole = torch.from_numpy(picture.mask()).expand(1, 3, -1, -1)
        patch = self.sampler(whole, torch.tensor([draw.sigma]), torch.tensor([draw.u, draw.v]))
        return patch[0, 0].numpy()

    @torch.no_grad()
    def prediction(self, image: Tensor, cond: Conditioning) -> Tensor:
        """What the base model predicts, shaped as a target.

        Args:
            image: tokens after its last block, [1, N, D].
            cond: conditioning.
        """
        family = self.model.family
        return family.learned(family.head(self.skeleton, image, cond, self.grid))

    def per_prompt(self, names: Sequence[str], tokens: int) -> list[Mapping[str, np.ndarray]]:
        """Conditioning ``names``, that depends on the prompt alone, of each prompt of ``tokens``
        tokens.
        """
        family = self.model.family
        latents, _ = family.blank(self.skeleton, self.grid, tokens)
        stored: list[Mapping[str, np.ndarray]] = []
        for prompt in self.prompts.values():
            inputs = family.inputs(self.skeleton, latents, 0.0, prompt, self.grid)
            _, cond = family.begin(self.skeleton, inputs)
            stored.append({COND + name: cond[name].float().numpy() for name in names})
        return stored


def normal_of(seed: int, stream: int, shape: tuple[int, ...]) -> Tensor:
    """`edge_dit.contract.noise.normal` as a tensor."""
    return torch.from_numpy(normal(seed, stream, shape))


def encoders_of(model: Model, skeleton: nn.Module, vae: bool = True) -> Any:
    """A model's pipeline, to encode prompts and images with.

    Args:
        model: whose.
        skeleton: its transformer, blocks on the meta device.
        vae: whether images are encoded; the autoencoder is not loaded otherwise.

    Raises:
        BadInput: diffusers cannot load it.
    """
    parts = {"transformer": skeleton, **({} if vae else {"vae": None})}
    return load_pipeline(model.folder, keep_text=True, variant=model.variant, **parts)


def source_of(
    plan: Plan,
    model: Model,
    pipeline: Any,
    prompts: Mapping[int, str],
    images: Mapping[int, Captioned],
) -> Source:
    """Encode prompts. Of the pipeline only transformer and autoencoder are needed after that; the
    caller should not keep it.

    Args:
        plan: of the bank.
        model: of the plan.
        pipeline: from `encoders_of`.
        prompts: texts by number.
        images: by number.

    Raises:
        BadInput: a prompt is longer than the plan's.
    """
    encoded = model.family.encode_prompts(pipeline, list(prompts.values()), plan.text_tokens)
    if images:
        round_autoencoder(pipeline.vae, plan.held)
    return Source(
        model,
        pipeline.transformer,
        pipeline.vae.eval() if images else None,
        PatchSampler(plan.crop_rule),
        plan.passing_grid,
        images,
        dict(zip(prompts, encoded, strict=True)),
        plan.tile,
        plan.weighted,
        plan.masked,
        windows=plan.window_rule,
    )


# ---------------------------------------------------------------- draws through the blocks

States = dict[int, State]
"""Number of a block -> the state that enters it; the number of blocks -> the last state."""


def borders_of(plan: Plan, starts: Sequence[Start] = ()) -> set[int]:
    """Numbers of the blocks that a stored tensor needs the entering state of.

    Args:
        plan: of the bank.
        starts: the draws; prior ones need the last state too.
    """
    last = {plan.layers} if any(start.prior for start in starts) else set()
    return borders(plan.layers, plan.trained, tail=plan.tail == STORED) | last


class Passed(NamedTuple):
    """What is kept of a draw that passed the blocks.

    Attributes:
        states: at the `borders_of` its plan.
        outside: what blocks are given of what is around its window, by full names.
    """

    states: States
    outside: Conditioning


@torch.no_grad()
def passed(
    plan: Plan,
    checkpoint: Checkpoint,
    starts: Sequence[Start],
    advance: Callable[..., None],
    first: int = 0,
) -> list[Passed]:
    """Run draws through the model, block by block, up to the last one that something is kept of.

    Args:
        plan: of the bank.
        checkpoint: of the model.
        starts: the draws.
        advance: of a progress bar that counts draws.
        first: number of the block that the draws start at.
    """
    borders, family, grid = borders_of(plan, starts), checkpoint.family, plan.passing_grid
    watched = {*plan.running} if plan.surroundings else set()
    last = max(borders | {number + 1 for number in watched})
    states = [start.state for start in starts]
    kept = [Passed({}, {}) for _ in starts]
    for number in range(first, last + 1):
        if number in borders:
            for of, state in zip(kept, states, strict=True):
                of.states[number] = state
        if number == last:
            break
        name, way = checkpoint.names[number], family.surroundings if number in watched else None
        with checkpoint.block(number) as block:
            for row, (start, of) in enumerate(zip(starts, kept, strict=True)):
                with way.watch(block) if way else nullcontext({}) as seen:
                    states[row] = family.run_block(name, block, states[row], start.cond, grid)
                if way and start.window:
                    around = way.around(block, seen, start.window)
                    of.outside.update({f"{what}.{name}": value for what, value in around.items()})
        advance(len(starts) / (last - first))
    if last == first:
        advance(len(starts))
    return kept


def tensors_of(
    plan: Plan, source: Source, blocks: Sequence[str], start: Start, kept: Passed
) -> dict[str, np.ndarray]:
    """The tensors of a draw, with those that depend on its prompt alone.

    Args:
        plan: of the bank.
        source: that the draw is from.
        blocks: names of all blocks of the model, in order.
        start: the draw.
        kept: of it.
    """
    states, tail = kept.states, None
    if plan.tail == STORED:
        tail = difference(states[plan.layers], states[plan.layers - plan.tail_skip]).image
    inner = {
        first: difference(states[after], states[first])
        for after, first in inner_runs(plan.trained).items()
    }
    entry = states[plan.head_skip]
    cond, target = plan.reads(blocks, {**start.cond, **kept.outside}), start.target
    if start.prior:
        target = source.prediction(states[plan.layers].image, start.cond)
    batch = as_batch(entry, tail, cond, target, start.weight, inner)
    arrays = {name: value.numpy() for name, value in batch.items()}
    return start.window.cut(arrays, plan.placed(source.model.family)) if start.window else arrays
