"""How good is an adapter? Held-out loss and pictures with the whole, unskipped model.

And what LoRA on all blocks at full resolution reaches in as many steps. (PAPER sec. 2: "After
training, the LoRA is used with the full, unskipped model".)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from edge_dit.adamw import learning_rate
from edge_dit.bank import GOLDEN
from edge_dit.families import family_module
from edge_dit.images import Captioned
from edge_dit.pipeline import quiet
from edge_dit.plan import Plan
from edge_dit.progress import bar
from edge_dit.subgraph import add_lora, lora_modules, lora_name

LEVELS = 8
"""Noise levels at which held-out loss is measured, the middles of equal parts of (0, 1)."""


@dataclass(frozen=True)
class Whole:
    """A whole image, encoded: clean latents [1, C, h, w], prompt embeddings [1, L, width] without
    padding, and their mask of ones [1, L].
    """

    clean: Tensor
    embeds: Tensor
    mask: Tensor


def encode_whole(plan: Plan, pipeline: Any, images: list[Captioned]) -> list[Whole]:
    """Images centre-cropped to squares of s_max pixels, encoded with their captions."""
    family = family_module(plan.family)
    encoded = []
    for image in images:
        height, width = image.pixels.shape[1:]
        top, left = (height - plan.s_max) // 2, (width - plan.s_max) // 2
        square = image.pixels[:, top : top + plan.s_max, left : left + plan.s_max]
        clean = family.encode_image(pipeline.vae, torch.from_numpy(square.copy()).unsqueeze(0))
        embeds, mask = family.encode_prompts(pipeline, [image.caption])[0]
        tokens = int(mask.sum())
        encoded.append(Whole(clean, embeds[:, :tokens], mask[:, :tokens]))
    return encoded


def flow_matching_loss(model: Any, whole: Whole, sigma: float, steps: int, seed: int) -> Tensor:
    """Loss of the stock transformer on one noised image, a scalar.

    Args:
        model: the transformer.
        whole: the image.
        sigma: noise level in (0, 1].
        steps: the scheduler's training timesteps; the model's timestep is sigma * steps.
        seed: of the noise.
    """
    noise = torch.randn(whole.clean.shape, generator=torch.Generator().manual_seed(seed))
    found = model(
        (1 - sigma) * whole.clean + sigma * noise,
        encoder_hidden_states=whole.embeds,
        encoder_attention_mask=whole.mask,
        timestep=torch.tensor([sigma * steps], dtype=torch.float32),
        return_dict=False,
    )[0]
    return torch.nn.functional.mse_loss(found, noise - whole.clean)


def heldout_loss(plan: Plan, pipeline: Any, images: list[Whole]) -> float:
    """Mean flow-matching loss of the pipeline, as it is, over images and `LEVELS` noise levels; the
    noise is the same at every call.
    """
    steps = len(levels_of(plan))
    with torch.no_grad():
        losses = [
            float(
                flow_matching_loss(
                    pipeline.transformer,
                    image,
                    (level + 0.5) / LEVELS,
                    steps,
                    LEVELS * number + level,
                )
            )
            for number, image in enumerate(images)
            for level in range(LEVELS)
        ]
    return float(np.mean(losses))


def levels_of(plan: Plan) -> np.ndarray:
    """The noise levels of the plan's scheduler, ascending."""
    family = family_module(plan.family)
    return family.sigmas(family.scheduler_config(plan.model))


def train_full_lora(
    plan: Plan, pipeline: Any, images: list[Whole], steps: int
) -> dict[str, np.ndarray]:
    """LoRA on every block at full resolution by torch eager - what users do today; the adapter by
    diffusers names. The pipeline is left without it.
    """
    family, adamw = family_module(plan.family), plan.optimizer
    model = pipeline.transformer
    modules = lora_modules(family, range(plan.layers), plan.lora_targets)
    add_lora(model, modules, plan.rank, plan.alpha, plan.seed)
    parameters = {lora_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=adamw.lr,
        betas=(adamw.beta1, adamw.beta2),
        eps=adamw.eps,
        weight_decay=adamw.weight_decay,
    )
    levels = levels_of(plan)
    with bar("full LoRA (torch)", steps) as advance:
        for step in range(steps):
            turn, number = divmod(step, len(images))
            place = (turn * GOLDEN + number / len(images)) % 1.0
            sigma = float(levels[int(place * len(levels))])
            loss = flow_matching_loss(model, images[number], sigma, len(levels), step)
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, adamw.lr)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), adamw.max_grad_norm)
            optimizer.step()
            advance(note=f"loss {float(loss.detach()):.4f}")
    adapter = {name: p.detach().numpy().copy() for name, p in parameters.items()}
    model.delete_adapters("default")
    return adapter


@contextmanager
def adapted(pipeline: Any, folder: Path | None) -> Iterator[Any]:
    """The pipeline with the LoRA of ``folder`` (as written by `edge-dit adapter`), or as it is."""
    if folder is None:
        yield pipeline
        return
    with quiet():
        pipeline.load_lora_weights(folder)
    try:
        yield pipeline
    finally:
        pipeline.unload_lora_weights()


def contact_sheet(
    plan: Plan, pipeline: Any, prompts: list[str], seeds: list[int], title: str
) -> Image.Image:
    """Pictures of every prompt (rows) and seed (columns), captions above the rows."""
    family, strip, size = family_module(plan.family), 16, plan.s_max
    sheet = Image.new("RGB", (len(seeds) * size, strip + len(prompts) * (size + strip)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 2), title, fill="black")
    with bar(title, len(prompts)) as advance:
        for row, prompt in enumerate(prompts):
            top = strip + row * (size + strip)
            draw.text((4, top + 2), prompt, fill="black")
            for column, picture in enumerate(family.sample(pipeline, prompt, size, seeds)):
                sheet.paste(picture, (column * size, top + strip))
            advance()
    return sheet
