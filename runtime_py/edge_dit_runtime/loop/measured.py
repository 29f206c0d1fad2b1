"""What verify compares of the loop's parts: draws of a made-up picture, and steps of painting."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_dit.contract.adapter import with_random_b
from edge_dit.contract.bank import Draw
from edge_dit.contract.bundle import Bundle
from edge_dit.contract.loop import LoopFacts
from edge_dit.contract.noise import NOISE, normal
from edge_dit.contract.objective import Objective
from edge_dit.pictures.dataset import Captioned
from edge_dit.pictures.draws import Drawn, DrawRule
from edge_dit_runtime.loop.parts import Parts
from edge_dit_runtime.loop.starts import Starts, planned_of
from edge_dit_runtime.sessions.trainer import Tensors

DRAWS = 3
"""Draws of the made-up picture."""
BEYOND = (3, 17)
"""Its sides are longer than s_max by these, pixels."""
SEED = 20
"""Of the picture, the draws and the latents."""
LOOP = "loop"
"""Stands for the loop's parts where verify names layouts."""


@dataclass(frozen=True)
class LoopProbe:
    """Where the loop's parts are compared.

    Attributes:
        image: a made-up picture.
        draws: of it, all with prompt 0.
        prompts: numbers in the bundle of the prompts that are painted; the first is that of the
            draws.
        latents: that painting is tried on, as the transformer takes them; and that are decoded.
        timesteps: of the scheduler: the first, the middle and the last one.
    """

    image: Captioned
    draws: list[Draw]
    prompts: list[int]
    latents: np.ndarray
    timesteps: list[float]


def loop_probe(bundle: Bundle, facts: LoopFacts, objective: Objective) -> LoopProbe:
    """Where to compare a bundle's parts; the same on host and device.

    Args:
        bundle: opened.
        facts: its loop.
        objective: of the model.
    """
    plan = planned_of(bundle)
    height, width = (plan.s_max + more for more in BEYOND)
    positive = next(n for n in range(len(facts.prompts)) if n not in facts.negatives)
    prompts = [positive] + ([] if facts.negative is None else [facts.negative])
    rule = DrawRule(SEED, objective.level, [Drawn((height, width), (0,))], plan.crop_rule)
    side = plan.s_max // facts.latents.factor
    steps = facts.painting.steps if facts.painting else []
    chosen = sorted({0, len(steps) // 2, len(steps) - 1}) if steps else []
    return LoopProbe(
        image=_made_up(height, width, facts.prompts[positive]),
        draws=rule.draws(DRAWS),
        prompts=prompts,
        latents=normal(SEED, NOISE, facts.latents.shape(side)),
        timesteps=[steps[number].timestep for number in chosen],
    )


def _made_up(height: int, width: int, caption: str) -> Captioned:
    """Waves of every colour with noise: smooth and sharp places."""
    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(2 * np.pi * (3 * rows * k + 2 * columns + k / 3)) for k in (1, 2, 3)]
    noise = normal(SEED, NOISE, (height, width, 3))
    pixels = np.clip(np.stack(waves, axis=2) * 90 + noise * 12 + 128, 0, 255).astype(np.uint8)
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    return Captioned("made up", digest, (caption,), (height, width), False, lambda: pixels)


def measure_loop(parts: Parts, adapter: Mapping[str, np.ndarray]) -> Tensors:
    """By name: "prompts.<tensor of the tables>", "collect.<draw>.<batch tensor>",
    "paint.<timestep>.<prompt>" (predictions with a LoRA whose B is not zero), "paint.pixels".

    Args:
        parts: of the bundle.
        adapter: the initial adapter.
    """
    probe = loop_probe(parts.bundle, parts.facts, parts.objective)
    measured = {f"prompts.{name}": value for name, value in parts.tables().items()}
    starts = Starts(parts, [probe.image], {0: probe.prompts[0]})
    begun = [starts.enter(draw, starts.encode(draw)) for draw in probe.draws]
    measured |= named_draws(starts.tensors(begun))
    lora = with_random_b(adapter)
    for number, timestep in enumerate(probe.timesteps):
        found = parts.predictions(probe.latents, timestep, probe.prompts, lora)
        for prompt, value in zip(probe.prompts, found, strict=True):
            measured[f"paint.{number}.{prompt}"] = value
    if parts.facts.painting:
        measured["paint.pixels"] = parts.decode(probe.latents, parts.facts.painting.side)
    return measured


def named_draws(draws: Sequence[Mapping[str, np.ndarray]]) -> Tensors:
    """Tensors of draws as `measure_loop` names them."""
    return {f"collect.{n}.{name}": v for n, draw in enumerate(draws) for name, v in draw.items()}
