"""Fill a bank: what the frozen blocks contribute to each draw (docs/method.md, Eq. 1 and Eq. 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from edge_dit.contract import bank
from edge_dit.contract.names import COND, STORED
from edge_dit.models.checkpoint import Checkpoint
from edge_dit.models.families.family import Conditioning, Family, Grid, Prompt, State
from edge_dit.models.model import Model
from edge_dit.models.pipeline import load_pipeline
from edge_dit.models.subgraph import as_batch, difference, inner_runs
from edge_dit.pictures.dataset import Captioned, check_readable
from edge_dit.pictures.draws import plan_draws
from edge_dit.pictures.patch_sampler import PatchSampler
from edge_dit.planning.plan import Plan, model_of
from edge_dit.progress import bar
from edge_dit.reference.eager import blank_batch

SHARD_BYTES = 128 * 2**20
"""About how many bytes of draws are in memory at once. The draws of a shard go through the model
together, block by block, so each block is read from disk once per shard.
"""


def precompute(plan: Plan, images: list[Captioned], folder: Path) -> bank.Index:
    """Write the bank of a plan, or finish one that was stopped; its index.

    Per draw: crop and resize (Eq. 1), encode, add noise, run the frozen model, and keep the entry
    state, the residuals (Eq. 3), the conditioning and the target. The same plan and images give the
    same bytes. Only one block of the transformer is in memory at a time.

    Args:
        plan: from `edge_dit.planning.make.make_plan`.
        images: from `edge_dit.pictures.dataset.read_folder`, shorter side ``plan.s_max``.
        folder: where the bank goes.

    Raises:
        BadInput: the folder holds another bank; the model is damaged or not the plan's; or pictures
            that are drawn cannot be decoded, which is found before any draw is computed.
    """
    model = model_of(plan)
    checkpoint = model.checkpoint()
    skeleton = checkpoint.skeleton()
    index = plan_index(plan, model, images, blank_batch(plan, model, skeleton))
    occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    missing = bank.begin(folder, index) if occupied else None
    if missing == [] and (folder / bank.PROMPTS).is_file():
        return index
    shards = range(index.shards) if missing is None else missing
    drawn = {index.draws[number].image for shard in shards for number in index.members(shard)}
    check_readable(images[number] for number in sorted(drawn))
    prompts, numbered = dict(enumerate(index.prompts)), dict(enumerate(images))
    source = source_of(plan, model, encoders_of(model, skeleton), prompts, numbered)
    if missing is None:  # not before: a pipeline that cannot be loaded leaves no bank behind
        missing = bank.begin(folder, index)
    if not (folder / bank.PROMPTS).is_file():
        bank.write_prompts(folder, source.per_prompt(plan.text_tokens))
    done = len(index.draws) - sum(len(index.members(shard)) for shard in missing)
    with bar("precompute", len(index.draws), done) as advance:
        for shard in missing:
            numbers = index.members(shard)
            starts = [source.start(index.draws[number]) for number in numbers]
            kept = states_at(borders_of(plan), checkpoint, starts, plan.grid, advance)
            stored = (
                bank.narrowed(_without_prompt(model.family, batch), plan.bank_dtype)
                for batch in map(partial(tensors_of, plan), starts, kept)
            )
            bank.write_shard(folder, shard, dict(zip(numbers, stored, strict=True)))
    return index


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
    prompts = list(dict.fromkeys(image.caption for image in images))
    draws = plan_draws(
        plan.draws,
        plan.seed,
        model.objective.level,
        [prompts.index(image.caption) for image in images],
        [image.size for image in images],
        plan.crop_rule,
    )
    named = [{"name": image.name, "sha256": image.sha256} for image in images]
    bytes_each = sum(4 * value.numel() for value in blank.values())
    shard = max(1, min(bank.SHARD, SHARD_BYTES // bytes_each))
    return bank.Index(plan.identity(), named, prompts, draws, shard, plan.bank_dtype)


# ---------------------------------------------------------------- draws before the first block


class Start(NamedTuple):
    """A draw before the first block, or before a later one: state, conditioning, target, and weight
    of its loss.
    """

    state: State
    cond: Conditioning
    target: Tensor
    weight: float | None


@dataclass(frozen=True)
class Source:
    """What all draws are made from.

    Attributes:
        model: of the plan.
        skeleton: its transformer, blocks on the meta device.
        vae: the autoencoder; None where no image is encoded.
        sampler: cuts patches out of images.
        grid: token rows and columns of a patch.
        images: as read, by number.
        prompts: encoded, by number in the bank's index.
    """

    model: Model
    skeleton: nn.Module
    vae: nn.Module | None
    sampler: PatchSampler
    grid: Grid
    images: Mapping[int, Captioned]
    prompts: Mapping[int, Prompt]

    @torch.no_grad()
    def start(self, draw: bank.Draw) -> Start:
        """Cut and encode the patch of a draw, then `enter`."""
        pixels = torch.from_numpy(self.images[draw.image].pixels).unsqueeze(0)
        patch = self.sampler(pixels, torch.tensor([draw.sigma]), torch.tensor([draw.u, draw.v]))
        generator = torch.Generator().manual_seed(draw.seed)
        return self.enter(draw, self.model.family.encode_image(self.vae, patch, generator))

    @torch.no_grad()
    def enter(self, draw: bank.Draw, clean: Tensor) -> Start:
        """Add a draw's noise to its clean latents, and run the model up to its first block."""
        family, objective = self.model.family, self.model.objective
        noise = noise_of(family, draw.seed, clean.shape)
        inputs = family.inputs(
            self.skeleton,
            objective.noised(clean, noise, draw.sigma),
            objective.timestep(draw.sigma),
            self.prompts[draw.prompt],
            self.grid,
        )
        state, cond = family.begin(self.skeleton, inputs)
        return Start(state, cond, objective.target(clean, noise), objective.weight(draw.sigma))

    def per_prompt(self, tokens: int) -> list[Mapping[str, np.ndarray]]:
        """Conditioning that depends on the prompt alone, of each prompt of ``tokens`` tokens."""
        family = self.model.family
        latents, _ = family.blank(self.skeleton, self.grid, tokens)
        stored: list[Mapping[str, np.ndarray]] = []
        for prompt in self.prompts.values():
            inputs = family.inputs(self.skeleton, latents, 0.0, prompt, self.grid)
            _, cond = family.begin(self.skeleton, inputs)
            stored.append({COND + name: cond[name].numpy() for name in family.per_prompt})
        return stored


def noise_of(family: Family, seed: int, shape: Sequence[int]) -> Tensor:
    """The noise of a draw. One generator makes all its random numbers: first those that
    `Family.encode_image` takes, then the noise.

    Args:
        family: of the model.
        seed: of the draw.
        shape: of its latents.
    """
    generator = torch.Generator().manual_seed(seed)
    if family.samples_posterior:
        torch.randn(*shape, generator=generator)
    return torch.randn(*shape, generator=generator)


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
    return Source(
        model,
        pipeline.transformer,
        pipeline.vae.eval() if images else None,
        PatchSampler(plan.crop_rule),
        plan.grid,
        images,
        dict(zip(prompts, encoded, strict=True)),
    )


# ---------------------------------------------------------------- draws through the blocks

States = dict[int, State]
"""Number of a block -> the state that enters it; the number of blocks -> the last state."""


def borders_of(plan: Plan) -> set[int]:
    """Numbers of the blocks that a stored tensor needs the entering state of."""
    runs = inner_runs(plan.trained)
    tail = (plan.layers - plan.tail_skip, plan.layers) if plan.tail == STORED else ()
    return {plan.head_skip, *tail, *runs, *runs.values()}


@torch.no_grad()
def states_at(
    borders: set[int],
    checkpoint: Checkpoint,
    starts: list[Start],
    grid: Grid,
    advance: Callable[..., None],
    first: int = 0,
) -> list[States]:
    """Run draws through the model, block by block, up to the last border; each draw's states at
    the borders.

    Args:
        borders: numbers of blocks.
        checkpoint: of the model.
        starts: the draws.
        grid: token rows and columns of a patch.
        advance: of a progress bar that counts draws.
        first: number of the block that the draws start at.
    """
    last = max(borders)
    states = [start.state for start in starts]
    kept: list[States] = [{} for _ in starts]
    for number in range(first, last + 1):
        if number in borders:
            for states_of_draw, state in zip(kept, states, strict=True):
                states_of_draw[number] = state
        if number == last:
            break
        with checkpoint.block(number) as block:
            states = [
                checkpoint.family.run_block(block, state, start.cond, grid)
                for state, start in zip(states, starts, strict=True)
            ]
        advance(len(starts) / (last - first))
    if last == first:
        advance(len(starts))
    return kept


def tensors_of(plan: Plan, start: Start, states: States) -> dict[str, np.ndarray]:
    """The tensors of a draw, with those that depend on its prompt alone.

    Args:
        plan: of the bank.
        start: the draw.
        states: at the `borders_of` of the plan.
    """
    tail = None
    if plan.tail == STORED:
        tail = difference(states[plan.layers], states[plan.layers - plan.tail_skip]).image
    inner = {
        first: difference(states[after], states[first])
        for after, first in inner_runs(plan.trained).items()
    }
    entry = states[plan.head_skip]
    batch = as_batch(entry, tail, start.cond, start.target, start.weight, inner)
    return {name: value.numpy() for name, value in batch.items()}


def _without_prompt(family: Family, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A draw without the tensors that depend on its prompt alone."""
    shared = {COND + name for name in family.per_prompt}
    return {name: value for name, value in batch.items() if name not in shared}
