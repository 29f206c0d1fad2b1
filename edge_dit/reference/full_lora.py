"""LoRA on all blocks at full resolution by torch eager: what users do today, to compare with."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_dit.contract.adamw import learning_rate
from edge_dit.models.model import Model
from edge_dit.models.subgraph import add_lora, lora_modules, lora_name, remove_lora
from edge_dit.pictures.draws import GOLDEN
from edge_dit.planning.plan import Plan
from edge_dit.progress import bar
from edge_dit.reference.eager import ClippedAdamW, copied
from edge_dit.reference.evaluate import Whole, whole_loss


def train_full_lora(
    plan: Plan, model: Model, pipeline: Any, images: list[Whole], steps: int
) -> dict[str, np.ndarray]:
    """Train LoRA on every block; the adapter by diffusers names.

    Args:
        plan: its LoRA, optimizer, schedule and seed are used.
        model: of the plan.
        pipeline: of the model; the LoRA is removed from it at the end.
        images: encoded by `edge_dit.reference.evaluate.encode_whole`.
        steps: number of training steps.
    """
    transformer, objective = pipeline.transformer, model.objective
    modules = lora_modules(model.family, transformer, range(plan.layers), plan.lora_targets)
    add_lora(transformer, modules, plan.rank, plan.alpha, plan.seed)
    parameters = {lora_name(n): p for n, p in transformer.named_parameters() if p.requires_grad}
    optimizer = ClippedAdamW(parameters, plan.optimizer)
    course = plan.schedule, plan.warmup
    with bar("full LoRA (torch)", steps) as advance:
        for step in range(steps):
            turn, number = divmod(step, len(images))
            sigma = objective.level((turn * GOLDEN + number / len(images)) % 1.0)
            loss = whole_loss(model, transformer, images[number], sigma, seed=step)
            value = optimizer.backward(loss * (objective.weight(sigma) or 1.0))
            optimizer.step(learning_rate(step, steps, plan.optimizer.lr, *course))
            advance(note=f"loss {value:.4f}")
    adapter = {name: copied(parameter) for name, parameter in parameters.items()}
    remove_lora(transformer)
    return adapter
