"""How good is an adapter? The loss of the whole, unskipped model on images it was not trained on.

The LoRA is trained in the middle blocks and used with the whole model (docs/method.md, Eq. 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_dit.contract.adapter import peft_folder
from edge_dit.contract.noise import POSTERIOR
from edge_dit.models.families.family import Grid, Prompt
from edge_dit.models.model import Model
from edge_dit.models.pipeline import quiet
from edge_dit.pictures.dataset import Captioned
from edge_dit.planning.plan import Plan
from edge_dit.reference.precompute import normal_of

LEVELS = 8
"""Noise levels at which the loss is measured, the middles of equal parts of (0, 1)."""


@dataclass(frozen=True)
class Whole:
    """A whole image, encoded: clean latents, prompt, and token grid."""

    clean: Tensor
    prompt: Prompt
    grid: Grid


def encode_whole(plan: Plan, model: Model, pipeline: Any, images: list[Captioned]) -> list[Whole]:
    """Encode images, cropped at the centre to squares of s_max pixels, and their captions.

    Args:
        plan: its s_max is the side of the squares.
        model: of the plan.
        pipeline: of the model.
        images: shorter side s_max.

    Raises:
        BadInput: a caption is longer than the pipeline takes.
    """
    family, side = model.family, plan.s_max // plan.multiple
    encoded = []
    for number, image in enumerate(images):
        height, width = image.size
        top, left = (height - plan.s_max) // 2, (width - plan.s_max) // 2
        square = image.pixels[:, top : top + plan.s_max, left : left + plan.s_max]
        pixels = torch.from_numpy(square.copy()).unsqueeze(0)
        clean = family.encode_image(pipeline.vae, pixels, partial(normal_of, number, POSTERIOR))
        tokens = family.text_tokens(model.folder, [image.caption])
        prompt = family.encode_prompts(pipeline, [image.caption], tokens)[0]
        encoded.append(Whole(clean, prompt, (side, side)))
    return encoded


def whole_loss(model: Model, transformer: Any, image: Whole, sigma: float, seed: int) -> Tensor:
    """Loss of the stock transformer on one noised image, a scalar.

    Args:
        model: that the transformer is of.
        transformer: with or without an adapter.
        image: encoded.
        sigma: noise level in (0, 1].
        seed: of the noise.
    """
    family, objective = model.family, model.objective
    noise = torch.randn(image.clean.shape, generator=torch.Generator().manual_seed(seed))
    noised = objective.noised(image.clean, noise, sigma)
    inputs = family.inputs(transformer, noised, objective.timestep(sigma), image.prompt, image.grid)
    prediction = family.learned(transformer(**inputs, return_dict=False)[0])
    return torch.nn.functional.mse_loss(prediction, objective.target(image.clean, noise))


@torch.no_grad()
def heldout_loss(model: Model, pipeline: Any, images: list[Whole]) -> float:
    """Mean unweighted loss over images and `LEVELS` noise levels; the noise is always the same.

    Args:
        model: of the pipeline.
        pipeline: with or without an adapter.
        images: encoded by `encode_whole`.
    """
    losses = [
        float(
            whole_loss(
                model,
                pipeline.transformer,
                image,
                sigma=(level + 0.5) / LEVELS,
                seed=LEVELS * number + level,
            )
        )
        for number, image in enumerate(images)
        for level in range(LEVELS)
    ]
    return float(np.mean(losses))


@contextmanager
def adapted(pipeline: Any, folder: Path | None) -> Iterator[Any]:
    """The pipeline with an adapter, which is removed when the context ends.

    Args:
        pipeline: without an adapter.
        folder: of the adapter, as `edge-dit adapter` writes it; None leaves the pipeline as it is.
    """
    if folder is None:
        yield pipeline
        return
    stock = hasattr(pipeline, "load_lora_weights")
    with quiet():
        if stock:
            pipeline.load_lora_weights(folder)
        else:
            from peft import PeftModel

            transformer = pipeline.transformer
            pipeline.transformer = PeftModel.from_pretrained(transformer, peft_folder(folder))
    try:
        yield pipeline
    finally:
        if stock:
            pipeline.unload_lora_weights()
        else:
            pipeline.transformer = pipeline.transformer.unload()
