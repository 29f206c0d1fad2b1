"""Fill a bank: what the frozen blocks contribute to each draw (docs/method.md, Eq. 1 and Eq. 3)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edge_dit.contract import bank
from edge_dit.models.checkpoint import Checkpoint
from edge_dit.models.families import family_of
from edge_dit.models.families.family import Conditioning, Prompt, State
from edge_dit.models.objective import Objective
from edge_dit.models.pipeline import load_pipeline
from edge_dit.models.subgraph import as_batch, difference, inner_runs
from edge_dit.pictures.draws import plan_draws
from edge_dit.pictures.images import Captioned
from edge_dit.pictures.patch_sampler import PatchSampler
from edge_dit.planning.plan import Plan, check_model
from edge_dit.progress import bar
from edge_dit.reference.eager import blank_batch, objective_of

SHARD_BYTES = 128 * 2**20
"""Draws of a shard go through the model together, block by block: about this many bytes of them
are in memory at once, and each block is read from disk once per shard.
"""


def precompute(plan: Plan, images: list[Captioned], folder: Path) -> bank.Index:
    """Write the bank of a plan, or finish one that was stopped; its index.

    Per draw: crop and resize (Eq. 1), encode, noise, run the frozen model, keep the entry state,
    the tail residual (Eq. 3), the conditioning and the target. The same plan and images give the
    same bytes. Of the transformer, one block at a time is in memory.

    Args:
        plan: as made by `edge_dit.planning.plan.make_plan`.
        images: as read by `edge_dit.pictures.images.read_folder`, shorter side ``plan.s_max``.
        folder: where the bank goes.

    Raises:
        BadInput: the folder holds another bank; the model changed since the plan, or is damaged.
    """
    check_model(plan)
    family = family_of(plan.family)
    checkpoint = Checkpoint(family, plan.model)
    skeleton = checkpoint.skeleton()
    blank = blank_batch(plan, skeleton)
    index, objective = plan_index(plan, images, blank)
    occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    missing = bank.begin(folder, index) if occupied else None
    if missing == [] and (folder / bank.PROMPTS).is_file():
        return index

    pipeline = load_pipeline(plan.model, keep_text=True, transformer=skeleton)
    prompts = family.encode_prompts(pipeline, index.prompts, plan.text_tokens)
    vae = pipeline.vae.eval()
    del pipeline  # and with it the text encoders
    if missing is None:  # not before: a pipeline that cannot be loaded leaves no bank behind
        missing = bank.begin(folder, index)
    if not (folder / bank.PROMPTS).is_file():
        latents, _ = family.blank(skeleton, plan.grid, plan.text_tokens)
        conditions = [
            family.begin(skeleton, family.inputs(skeleton, latents, 0.0, prompt, plan.grid))[1]
            for prompt in prompts
        ]
        bank.write_prompts(
            folder,
            [{f"cond.{n}": cond[n].numpy() for n in family.per_prompt} for cond in conditions],
        )

    sampler = PatchSampler(plan.crop_rule)
    done = len(index.draws) - sum(len(index.members(shard)) for shard in missing)
    with bar("precompute", len(index.draws), done) as advance:
        for shard in missing:
            draws = [index.draws[number] for number in index.members(shard)]
            begun = [
                _begin(plan, skeleton, vae, sampler, objective, images, prompts, draw)
                for draw in draws
            ]
            through = _through_blocks(plan, checkpoint, begun, advance)
            stored = [bank.narrowed(draw, plan.bank_dtype) for draw in through]
            bank.write_shard(folder, shard, dict(zip(index.members(shard), stored, strict=True)))
    return index


Begun = tuple[State, Conditioning, Tensor, float | None]
"""State entering the model, conditioning, target and weight of a draw."""


@torch.no_grad()
def _begin(
    plan: Plan,
    skeleton: torch.nn.Module,
    vae: torch.nn.Module,
    sampler: PatchSampler,
    objective: Objective,
    images: list[Captioned],
    prompts: list[Prompt],
    draw: bank.Draw,
) -> Begun:
    family = family_of(plan.family)
    pixels = torch.from_numpy(images[draw.image].pixels).unsqueeze(0)
    patch = sampler(pixels, torch.tensor([draw.sigma]), torch.tensor([draw.u, draw.v]))
    generator = torch.Generator().manual_seed(draw.seed)
    clean = family.encode_image(vae, patch, generator)
    noise = torch.randn(clean.shape, generator=generator)
    inputs = family.inputs(
        skeleton,
        objective.noised(clean, noise, draw.sigma),
        objective.timestep(draw.sigma),
        prompts[draw.prompt],
        plan.grid,
    )
    state, cond = family.begin(skeleton, inputs)
    return state, cond, objective.target(clean, noise), objective.weight(draw.sigma)


@torch.no_grad()
def _through_blocks(
    plan: Plan, checkpoint: Checkpoint, begun: list[Begun], advance: Callable[..., None]
) -> list[dict[str, np.ndarray]]:
    """What a bank stores of each draw, one block of the model after the other."""
    family = checkpoint.family
    states = [state for state, *_ in begun]
    runs = inner_runs(plan.trained)
    begins, last = set(runs.values()), plan.layers - plan.tail_skip
    entries = tails = states
    before: list[State] = []
    inner: dict[int, list[State]] = {}
    for number in range(plan.layers):
        if number in runs:
            pairs = zip(states, before, strict=True)
            inner[runs[number]] = [difference(after, start) for after, start in pairs]
        if number in begins:
            before = states
        if number == plan.head_skip:
            entries = states
        if number == last:
            tails = states
        with checkpoint.block(number) as block:
            states = [
                family.run_block(block, state, cond, plan.grid)
                for state, (_, cond, _, _) in zip(states, begun, strict=True)
            ]
        advance(len(begun) / plan.layers)
    if not plan.tail_skip:
        tails = states
    batches = [
        as_batch(
            entry,
            state.image - tail.image,
            cond,
            target,
            weight,
            {first: residuals[number] for first, residuals in inner.items()},
        )
        for number, (entry, tail, state, (_, cond, target, weight)) in enumerate(
            zip(entries, tails, states, begun, strict=True)
        )
    ]
    shared = [f"cond.{name}" for name in family.per_prompt]
    return [{k: v.numpy() for k, v in batch.items() if k not in shared} for batch in batches]


def plan_index(
    plan: Plan, images: list[Captioned], blank: dict[str, Tensor]
) -> tuple[bank.Index, Objective]:
    """The index of the bank of ``plan`` over ``images``, and what its model predicts.

    Args:
        plan: of the bank.
        images: as read.
        blank: a draw of the plan's shapes.
    """
    objective = objective_of(plan)
    prompts = list(dict.fromkeys(image.caption for image in images))
    draws = plan_draws(
        plan.draws,
        plan.seed,
        objective.level,
        [prompts.index(image.caption) for image in images],
        [(image.pixels.shape[1], image.pixels.shape[2]) for image in images],
        plan.crop_rule,
    )
    named = [{"name": image.name, "sha256": image.sha256} for image in images]
    bytes_each = sum(4 * value.numel() for value in blank.values())
    shard = max(1, min(bank.SHARD, SHARD_BYTES // bytes_each))
    index = bank.Index(plan.identity(), named, prompts, draws, shard, plan.bank_dtype)
    return index, objective
