"""How good is an adapter? Held-out loss and pictures with the whole, unskipped model.

And what LoRA on all blocks at full resolution reaches in as many steps. A trained LoRA is used with
the whole model (docs/method.md, Eq. 3).
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

from edge_dit.contract.adamw import learning_rate
from edge_dit.contract.adapter import peft_folder
from edge_dit.models.families import family_of
from edge_dit.models.families.family import Family, Grid, Prompt
from edge_dit.models.objective import Objective
from edge_dit.models.pipeline import quiet
from edge_dit.models.subgraph import add_lora, lora_modules, lora_name, remove_lora
from edge_dit.pictures.draws import GOLDEN
from edge_dit.pictures.images import Captioned
from edge_dit.planning.plan import Plan
from edge_dit.progress import bar
from edge_dit.reference.eager import objective_of

LEVELS = 8
"""Noise levels at which held-out loss is measured, the middles of equal parts of (0, 1)."""


@dataclass(frozen=True)
class Whole:
    """A whole image, encoded: clean latents, prompt, and token grid."""

    clean: Tensor
    prompt: Prompt
    grid: Grid


def encode_whole(plan: Plan, pipeline: Any, images: list[Captioned]) -> list[Whole]:
    """Images centre-cropped to squares of s_max pixels, encoded with their captions."""
    family = family_of(plan.family)
    side = plan.s_max // plan.multiple
    encoded = []
    for number, image in enumerate(images):
        height, width = image.pixels.shape[1:]
        top, left = (height - plan.s_max) // 2, (width - plan.s_max) // 2
        square = image.pixels[:, top : top + plan.s_max, left : left + plan.s_max]
        pixels = torch.from_numpy(square.copy()).unsqueeze(0)
        clean = family.encode_image(pipeline.vae, pixels, torch.Generator().manual_seed(number))
        tokens = family.text_tokens(plan.model, [image.caption])
        prompt = family.encode_prompts(pipeline, [image.caption], tokens)[0]
        encoded.append(Whole(clean, prompt, (side, side)))
    return encoded


def whole_loss(
    family: Family, objective: Objective, model: Any, whole: Whole, sigma: float, seed: int
) -> Tensor:
    """Loss of the stock transformer on one noised image, a scalar.

    Args:
        family: of the model.
        objective: what it predicts.
        model: the transformer.
        whole: the image.
        sigma: noise level in (0, 1].
        seed: of the noise.
    """
    noise = torch.randn(whole.clean.shape, generator=torch.Generator().manual_seed(seed))
    noised = objective.noised(whole.clean, noise, sigma)
    inputs = family.inputs(model, noised, objective.timestep(sigma), whole.prompt, whole.grid)
    found = family.learned(model(**inputs, return_dict=False)[0])
    return torch.nn.functional.mse_loss(found, objective.target(whole.clean, noise))


def heldout_loss(plan: Plan, pipeline: Any, images: list[Whole]) -> float:
    """Mean loss of the pipeline, as it is, over images and `LEVELS` noise levels, unweighted; the
    noise is the same at every call.
    """
    family, objective = family_of(plan.family), objective_of(plan)
    with torch.no_grad():
        losses = [
            float(
                whole_loss(
                    family,
                    objective,
                    pipeline.transformer,
                    image,
                    (level + 0.5) / LEVELS,
                    LEVELS * number + level,
                )
            )
            for number, image in enumerate(images)
            for level in range(LEVELS)
        ]
    return float(np.mean(losses))


def train_full_lora(
    plan: Plan, pipeline: Any, images: list[Whole], steps: int
) -> dict[str, np.ndarray]:
    """LoRA on every block at full resolution by torch eager - what users do today; the adapter by
    diffusers names. The pipeline is left without it.
    """
    family, adamw = family_of(plan.family), plan.optimizer
    model = pipeline.transformer
    modules = lora_modules(family, model, range(plan.layers), plan.lora_targets)
    add_lora(model, modules, plan.rank, plan.alpha, plan.seed)
    parameters = {lora_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=adamw.lr,
        betas=(adamw.beta1, adamw.beta2),
        eps=adamw.eps,
        weight_decay=adamw.weight_decay,
    )
    objective = objective_of(plan)
    with bar("full LoRA (torch)", steps) as advance:
        for step in range(steps):
            turn, number = divmod(step, len(images))
            sigma = objective.level((turn * GOLDEN + number / len(images)) % 1.0)
            loss = whole_loss(family, objective, model, images[number], sigma, step)
            loss = loss * (objective.weight(sigma) or 1.0)
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, adamw.lr)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), adamw.max_grad_norm)
            optimizer.step()
            advance(note=f"loss {float(loss.detach()):.4f}")
    adapter = {name: p.detach().numpy().copy() for name, p in parameters.items()}
    remove_lora(model)
    return adapter


@contextmanager
def adapted(pipeline: Any, folder: Path | None) -> Iterator[Any]:
    """The pipeline with the LoRA of ``folder`` (as written by `edge-dit adapter`), or as it is."""
    if folder is None:
        yield pipeline
        return
    stock = hasattr(pipeline, "load_lora_weights")
    with quiet():
        if stock:
            pipeline.load_lora_weights(folder)
        else:
            from peft import PeftModel

            model = pipeline.transformer
            pipeline.transformer = PeftModel.from_pretrained(model, peft_folder(folder))
    try:
        yield pipeline
    finally:
        if stock:
            pipeline.unload_lora_weights()
        else:
            pipeline.transformer = pipeline.transformer.unload()


def contact_sheet(
    plan: Plan, pipeline: Any, prompts: list[str], seeds: list[int], title: str
) -> Image.Image:
    """Pictures of every prompt (rows) and seed (columns), captions above the rows."""
    family, strip, size = family_of(plan.family), 16, plan.s_max
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
