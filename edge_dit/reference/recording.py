"""The steps of a pipeline's scheduler, written down: each is linear in all that entered it before.

The stock pipeline itself runs, with a transformer whose blocks change nothing. In place of latents
and predictions its scheduler gets unit vectors, so that its results are the factors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from edge_dit.contract.loop import Painting, PaintStep
from edge_dit.models.families.family import Family, Prompt

WIDTH = 64
"""Numbers in each of the random latents that linearity is checked on."""
TOLERANCE = 1e-5
"""Largest difference that passes, relative to the sum of the terms' largest values."""


Original = Callable[[Tensor, Tensor], Tensor]
"""A scheduler's own step: prediction and latents -> the next latents."""
Step = Callable[[Original, int], None]
"""Looks at a step, given its number."""


class NotLinear(Exception):
    """Steps that are not linear, with the reason."""


def record(
    family: Family, pipeline: Any, side: int, latents: Tensor, prompts: list[Prompt]
) -> Painting | str:
    """How a pipeline paints with `Family.sample_options`; or why that cannot be written down.

    Args:
        family: of the pipeline.
        pipeline: its transformer's blocks may lie on the meta device.
        side: of a picture, in pixels.
        latents: shaped as the transformer takes them.
        prompts: an encoded prompt and, in families with guidance, a negative one.
    """
    if reason := family.cannot_paint(pipeline):
        return reason
    options = family.sample_options(pipeline, 1)
    if "negative_prompt" in inspect.signature(type(pipeline).__call__).parameters:
        options["negative_prompt"] = None  # it is given encoded
    options |= {"height": side, "width": side, "output_type": "latent"}
    for prefix, prompt in zip(("", "negative_"), prompts, strict=False):
        options |= {prefix + key: value for key, value in family.as_arguments(prompt).items()}
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(latents.shape, generator=generator)
    rows = side // family.multiple(pipeline.transformer.config, pipeline.vae.config)
    handed = family.pipeline_latents(start, rows)

    def run(step: Step) -> list[float]:
        with (
            torch.no_grad(),
            family.without_blocks(pipeline.transformer),
            _replaced(pipeline.scheduler, (start, handed), step) as timesteps,
        ):
            pipeline(latents=handed, **options)
            return timesteps

    try:
        steps = _unit_steps(pipeline.scheduler, run)
        _check_linear(steps, run, generator)
    except NotLinear as reason:
        return str(reason)
    except ValueError as error:  # the pipeline's own check of its arguments
        return f"{type(pipeline).__name__} refuses to paint {side} pixels: {error}"
    mode, scale = _guidance(family, pipeline, options)
    return Painting(side=side, steps=steps, guidance=mode, scale=scale)


def _guidance(family: Family, pipeline: Any, options: dict[str, Any]) -> tuple[Any, float]:
    if not family.guides(pipeline):
        return "none", 1.0
    default = inspect.signature(type(pipeline).__call__).parameters[family.guided_by].default
    scale = float(options.get(family.guided_by, default))
    if scale <= family.guided_from:
        return "none", 1.0
    # p + s (p - u) is u + (1 + s) (p - u)
    scale += 1 - family.guided_from
    return "rescaled" if family.rescales else "classifier-free", scale


@contextmanager
def _replaced(scheduler: Any, starts: tuple[Tensor, Tensor], step: Step) -> Iterator[list[float]]:
    """A context in which a scheduler's steps are ``step(original, number)`` and change nothing;
    yields a list that gets their timesteps.

    Args:
        scheduler: of the pipeline.
        starts: noise as the transformer takes it, and as it is given to the pipeline.
        step: see `Step`.
    """
    kind, timesteps = type(scheduler), []

    def recorded(_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> tuple[Tensor]:
        if not timesteps and not any(torch.equal(sample, start) for start in starts):
            raise NotLinear(f"{kind.__name__} changes the noise that it starts from")
        step(lambda o, s: kind.step(scheduler, o, timestep, s, **options)[0], len(timesteps))
        timesteps.append(float(timestep))
        return (sample,)

    def unscaled(sample: Tensor, *arguments: Any) -> Tensor:
        if not torch.equal(kind.scale_model_input(scheduler, sample, *arguments), sample):
            raise NotLinear(f"{kind.__name__} scales what the transformer gets")
        return sample

    scheduler.step = recorded
    if hasattr(kind, "scale_model_input"):
        scheduler.scale_model_input = unscaled
    try:
        yield timesteps
    finally:
        for name in ("step", "scale_model_input"):
            scheduler.__dict__.pop(name, None)


def _unit_steps(scheduler: Any, run: Callable[[Step], list[float]]) -> list[PaintStep]:
    """The steps, from unit vectors: number 2 k are the latents that enter step k, 2 k + 1 is its
    prediction.
    """
    found: list[list[float]] = []

    def step(original: Original, number: int) -> None:
        units = torch.eye(2 * len(scheduler.timesteps))
        # Four axes, as latents have.
        sample, output = (units[None, None, None, 2 * number + n] for n in (0, 1))
        found.append(original(output, sample).flatten().tolist())

    timesteps = run(step)
    return [
        PaintStep(
            timestep=timestep,
            latents={n: f for n, f in enumerate(factors[::2]) if f},
            predictions={n: f for n, f in enumerate(factors[1::2]) if f},
        )
        for timestep, factors in zip(timesteps, found, strict=True)
    ]


def _check_linear(
    steps: list[PaintStep], run: Callable[[Step], list[float]], generator: torch.Generator
) -> None:
    """Raise `NotLinear` if random latents and predictions give other results than ``steps``."""
    samples = torch.randn(len(steps), 1, 1, 1, WIDTH, generator=generator)
    outputs = torch.randn(len(steps), 1, 1, 1, WIDTH, generator=generator)

    def step(original: Original, number: int) -> None:
        found = original(outputs[number], samples[number])
        terms = [samples[n] * f for n, f in steps[number].latents.items()]
        terms += [outputs[n] * f for n, f in steps[number].predictions.items()]
        error = (torch.stack(terms).sum(0) - found).abs().max()
        if not error <= TOLERANCE * torch.stack(terms).abs().sum(0).max():
            raise NotLinear(f"step {number} of the scheduler is random, or not linear")

    run(step)
