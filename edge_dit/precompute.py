"""Fill a bank: what the frozen blocks contribute to each draw (PAPER sec. 3.1 and 3.2)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edge_dit import bank
from edge_dit.errors import BadInput
from edge_dit.families import family_module
from edge_dit.images import Captioned
from edge_dit.patch_sampler import PatchSampler
from edge_dit.pipeline import load_pipeline
from edge_dit.plan import Plan, check_model
from edge_dit.progress import bar
from edge_dit.subgraph import as_batch


def precompute(plan: Plan, images: list[Captioned], folder: Path) -> bank.Index:
    """Write the bank of a plan, or finish one that was stopped; its index.

    Per draw: crop and resize (Eq. 1), encode, noise x_t = (1 - sigma) x_0 + sigma eps, run the
    frozen model once, keep the entry state, the tail residual (Eq. 3), the conditioning and the
    target velocity eps - x_0. The same plan and images give the same bytes.

    Args:
        plan: as made by `edge_dit.plan.make_plan`.
        images: as read by `edge_dit.images.read_folder`, shorter side ``plan.s_max``.
        folder: where the bank goes.

    Raises:
        BadInput: the folder holds another bank; the model changed since the plan.
    """
    check_model(plan)
    family = family_module(plan.family)
    index, levels = plan_index(plan, images)
    missing = bank.begin(folder, index)
    if not missing and (folder / bank.PROMPTS).is_file():
        return index

    pipeline = load_pipeline(plan.model)
    model, vae = pipeline.transformer.eval(), pipeline.vae.eval()
    texts = [_cut(e, m, plan) for e, m in family.encode_prompts(pipeline, index.prompts)]
    latents, timestep, _, _ = family.blank(model, plan.grid, plan.text_tokens)

    def conditions(text: tuple[Tensor, Tensor]) -> dict[str, np.ndarray]:
        seen = family.capture(model, latents, timestep, *text, plan.head_skip, plan.tail_skip)
        return {f"cond.{name}": seen.cond[name].numpy() for name in family.PROMPT_COND}

    if not (folder / bank.PROMPTS).is_file():
        bank.write_prompts(folder, [conditions(text) for text in texts])

    sampler = PatchSampler(plan.s_min, plan.s_max, plan.multiple)

    def tensors(draw: bank.Draw) -> dict[str, np.ndarray]:
        pixels = torch.from_numpy(images[draw.image].pixels).unsqueeze(0)
        sigma = torch.tensor([draw.sigma])
        patch = sampler(pixels, sigma, torch.tensor([draw.u, draw.v]))
        clean = family.encode_image(vae, patch)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(draw.seed))
        captured = family.capture(
            model,
            (1 - sigma) * clean + sigma * noise,
            sigma * len(levels),
            *texts[draw.prompt],
            plan.head_skip,
            plan.tail_skip,
        )
        shared = [f"cond.{name}" for name in family.PROMPT_COND]
        batch = as_batch(captured, noise - clean)
        return {name: value.numpy() for name, value in batch.items() if name not in shared}

    done = len(index.draws) - sum(len(_members(index, shard)) for shard in missing)
    with bar("precompute", len(index.draws), done) as advance:
        for shard in missing:
            stored = {}
            for number in _members(index, shard):
                stored[number] = tensors(index.draws[number])
                advance()
            bank.write_shard(folder, shard, stored)
    return index


def plan_index(plan: Plan, images: list[Captioned]) -> tuple[bank.Index, np.ndarray]:
    """The index of the bank of ``plan`` over ``images``, and the scheduler's noise levels."""
    family = family_module(plan.family)
    levels = family.sigmas(family.scheduler_config(plan.model))
    prompts = list(dict.fromkeys(image.caption for image in images))
    draws = bank.plan_draws(
        plan.draws,
        plan.seed,
        levels,
        [prompts.index(image.caption) for image in images],
        [(image.pixels.shape[1], image.pixels.shape[2]) for image in images],
        plan.s_min,
        plan.s_max,
        plan.multiple,
    )
    named = [{"name": image.name, "sha256": image.sha256} for image in images]
    return bank.Index(plan.identity(), named, prompts, draws), levels


def _members(index: bank.Index, shard: int) -> range:
    return range(shard * bank.SHARD, min((shard + 1) * bank.SHARD, len(index.draws)))


def _cut(embeds: Tensor, mask: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Embeddings and mask cut to the plan's text length; nothing but padding may be lost."""
    if mask[:, plan.text_tokens :].any():
        raise BadInput(
            "prompt",
            found=f"{int(mask.sum())} tokens",
            expected=f"at most {plan.text_tokens}, the longest prompt when the plan was made",
            remedy="plan again: edge-dit plan JOB -o plan.json",
        )
    return embeds[:, : plan.text_tokens], mask[:, : plan.text_tokens]
