"""How good is an adapter? Held-out loss and pictures with the whole, unskipped model.

And what LoRA on all blocks at full resolution reaches in as many steps. (PAPER sec. 2: "After
training, the LoRA is used with the full, unskipped model".)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from edge_dit.adamw import AdamW
from edge_dit.bank import GOLDEN
from edge_dit.families import family_module
from edge_dit.images import Captioned
from edge_dit.pipeline import quiet
from edge_dit.plan import Plan
from edge_dit.progress import bar
from edge_dit.subgraph import add_lora, lora_modules, lora_name

LEVELS = 8
"""Noise levels at which held-out loss is measured, the middles of equal parts of (0, 1)."""


def full_example(
    plan: Plan, pipeline: Any, image: Captioned, sigma: float, seed: int
) -> tuple[dict[str, Any], Tensor]:
    """Inputs of the stock transformer and the target velocity for one whole image, centre-cropped
    to a square of s_max pixels.
    """
    family = family_module(plan.family)
    height, width = image.pixels.shape[1:]
    top, left = (height - plan.s_max) // 2, (width - plan.s_max) // 2
    square = image.pixels[:, top : top + plan.s_max, left : left + plan.s_max]
    clean = family.encode_image(pipeline.vae, torch.from_numpy(square.copy()).unsqueeze(0))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    embeds, mask = family.encode_prompts(pipeline, [image.caption])[0]
    steps = len(family.sigmas(family.scheduler_config(plan.model)))
    inputs = {
        "hidden_states": (1 - sigma) * clean + sigma * noise,
        "encoder_hidden_states": embeds[:, : int(mask.sum())],
        "encoder_attention_mask": mask[:, : int(mask.sum())],
        "timestep": torch.tensor([sigma * steps], dtype=torch.float32),
    }
    return inputs, noise - clean


def heldout_loss(plan: Plan, pipeline: Any, images: list[Captioned]) -> float:
    """Mean flow-matching loss of the pipeline, as it is, over images and `LEVELS` noise levels; the
    noise is the same at every call.
    """
    losses = []
    with torch.no_grad():
        for number, image in enumerate(images):
            for level in range(LEVELS):
                sigma = (level + 0.5) / LEVELS
                inputs, target = full_example(plan, pipeline, image, sigma, 1000 * number + level)
                found = pipeline.transformer(**inputs, return_dict=False)[0]
                losses.append(float((found - target).square().mean()))
    return float(np.mean(losses))


def train_full_lora(
    plan: Plan, pipeline: Any, images: list[Captioned], adamw: AdamW, steps: int
) -> dict[str, np.ndarray]:
    """LoRA on every block at full resolution by torch eager - what users do today; the adapter by
    diffusers names. The pipeline is left without it.
    """
    family = family_module(plan.family)
    model = pipeline.transformer
    add_lora(model, lora_modules(family, 0, 0, plan.layers), plan.rank, plan.alpha, plan.seed)
    parameters = {lora_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=adamw.lr,
        betas=(adamw.beta1, adamw.beta2),
        eps=adamw.eps,
        weight_decay=adamw.weight_decay,
    )
    levels = family.sigmas(family.scheduler_config(plan.model))
    with bar("full LoRA (torch)", steps) as advance:
        for step in range(steps):
            turn, number = divmod(step, len(images))
            place = (turn * GOLDEN + number / len(images)) % 1.0
            sigma = float(levels[int(place * len(levels))])
            inputs, target = full_example(plan, pipeline, images[number], sigma, step)
            loss = (model(**inputs, return_dict=False)[0] - target).square().mean()
            optimizer.zero_grad()
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
    with bar(title, len(prompts) * len(seeds)) as advance:
        for row, prompt in enumerate(prompts):
            top = strip + row * (size + strip)
            draw.text((4, top + 2), prompt, fill="black")
            for column, seed in enumerate(seeds):
                picture = family.sample(pipeline, prompt, size, seed)
                sheet.paste(picture, (column * size, top + strip))
                advance()
    return sheet
