"""What a bundle says of itself, compared with its plan.

A manifest's learning rate or an adapter that both sides read would be right in every comparison of
numbers. So what they must be is worked out from the plan: the fresh LoRA of its seed, the shapes of
its sub-graph, its hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_dit.contract.adapter import read_adapter
from edge_dit.contract.bundle import ADAPTER, Bundle
from edge_dit.contract.loop import TILE, LoopFacts, Painting, PaintStep
from edge_dit.contract.targets import RECOMPUTE, TARGETS, WIDE
from edge_dit.errors import BadInput
from edge_dit.planning.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from edge_dit.models.subgraph import TrainableSubgraph
    from edge_dit_export.targets.loop_source import LoopSource

SAME = 1e-5
"""Largest relative difference of a fresh LoRA: random numbers of two processors differ by some
units in the last place.
"""


def false_claims(
    bundle: Bundle,
    plan: Plan,
    subgraph: TrainableSubgraph,
    batch: Mapping[str, Tensor],
    planned: Plan | None = None,
) -> list[str]:
    """Lines for people: what manifest and adapter say, and what it should be.

    Args:
        bundle: opened.
        plan: in its manifest.
        subgraph: of the plan, with its fresh LoRA.
        batch: a draw of the plan's shapes.
        planned: the plan as its user has it; None where only the bundle's is known.
    """
    from edge_dit.reference.eager import lora_tensors
    from edge_dit_export.export import tensor_specs

    manifest = bundle.manifest
    said = {
        "family": (manifest.family, plan.family),
        "plan_hash": (manifest.plan_hash, plan.identity()),
        **_pairs("optimizer", asdict(manifest.optimizer), asdict(plan.optimizer)),
    }
    if planned is not None:
        said |= _pairs("plan", plan.shared(), planned.shared())
    specs = tensor_specs(batch, subgraph.lora_parameters())
    sides = manifest.tensors, specs
    said |= _pairs("tensors", *({spec.name: spec.model_dump() for spec in side} for side in sides))
    have, want = ([spec.name for spec in side] for side in sides)
    if have != want:
        first = next((name for name, other in zip(have, want, strict=False) if name != other), "")
        found = f"{first}: another order, or a name twice"
        said["tensors"] = (found, "the order of the graphs' arguments")
    for target in manifest.targets:
        said |= _of_target(bundle, plan, target)
    lines = [
        f"manifest: {key} is {have!r:.100}, by the plan {want!r:.100}"
        for key, (have, want) in said.items()
        if have != want
    ]
    return [*lines, *_of_adapter(bundle, plan, lora_tensors(subgraph))]


def _pairs(
    what: str, have: Mapping[str, Any], want: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    keys = sorted(have.keys() | want.keys())
    return {f"{what}.{key}": (have.get(key), want.get(key)) for key in keys}


def _of_target(bundle: Bundle, plan: Plan, target: str) -> dict[str, tuple[Any, Any]]:
    """How a target stores frozen matrices, and whether it recomputes."""
    layouts = TARGETS[target].layouts if target in TARGETS else {}
    choices = {dtype for dtypes in layouts.values() for dtype in dtypes}
    said: dict[str, tuple[Any, Any]] = {}
    if plan.weights in choices:
        said[f"{target}: weights"] = (bundle.dtype(target), plan.weights)
    if target in TARGETS and plan.compute in TARGETS[target].computes:
        said[f"{target}: compute"] = (bundle.compute(target), plan.compute)
    if RECOMPUTE in layouts and (plan.weights == WIDE or plan.compute != WIDE):
        said[f"{target}: recompute"] = (RECOMPUTE in bundle.layouts(target), plan.recompute)
    return said


def _of_adapter(bundle: Bundle, plan: Plan, fresh: Mapping[str, np.ndarray]) -> Iterator[str]:
    """What is wrong with the adapter that training starts from."""
    try:
        tensors, rank, alpha = read_adapter(bundle.folder / ADAPTER)
    except BadInput as fault:
        yield f"{ADAPTER}: {fault.found}"
        return
    if (rank, alpha) != (plan.rank, plan.alpha):
        yield f"{ADAPTER}: rank {rank}, alpha {alpha:g}, by the plan {plan.rank}, {plan.alpha:g}"
    for name in sorted(tensors.keys() | fresh.keys()):
        if name not in tensors or name not in fresh:
            yield f"{ADAPTER}: {name} is {'missing' if name in fresh else 'not in the plan'}"
        elif tensors[name].shape != fresh[name].shape:
            have, want = (list(side[name].shape) for side in (tensors, fresh))
            yield f"{ADAPTER}: {name} of shape {have}, by the plan {want}"
        elif not np.abs(tensors[name] - fresh[name]).max() <= SAME * np.abs(fresh[name]).max():
            yield f"{ADAPTER}: {name} is not the fresh LoRA of the plan's seed {plan.seed}"


def loop_claims(facts: LoopFacts, source: LoopSource) -> list[str]:
    """What a manifest says of the loop beside what the model's own pipeline says: lines for people.

    Args:
        facts: in the manifest.
        source: made anew from the model and the manifest's prompts.
    """
    family, config = source.family, source.skeleton.config
    said = {
        "latents": (facts.latents, family.latents(source.vae)),
        "timestep_factor": (facts.timestep_factor, family.timestep_factor(config)),
        "per_prompt": (facts.per_prompt, list(source.per_prompt)),
        "placed": (facts.placed, list(source.placed)),
        "levels": (facts.levels, source.levels),
        "negatives": (facts.negatives, source.negatives),
        "negative": (facts.negative, source.negative),
        "tile": (facts.tile, TILE),
    }
    blocks = [block.name for block in facts.blocks]
    said["blocks"] = (blocks, source.checkpoint.names)
    if facts.painting is not None:
        said["paint_blocks"] = ([b.name for b in facts.paint_blocks], source.checkpoint.names)
    lines = [
        f"loop {key}: {have!r:.200}, by the model {want!r:.200}"
        for key, (have, want) in said.items()
        if have != want
    ]
    return lines + _painting_claims(facts.painting, source.painting)


def _painting_claims(have: Painting | None, want: Painting | None) -> list[str]:
    """The same of the scheduler's steps, whose factors may differ by rounding."""
    if have is None or want is None:
        return [] if have is want else [f"loop painting: {have!r:.100}, by the model {want!r:.100}"]
    fixed = ("side", "guidance", "scale")
    lines = [
        f"loop painting {key}: {getattr(have, key)}, by the scheduler {getattr(want, key)}"
        for key in fixed
        if getattr(have, key) != getattr(want, key)
    ]
    if len(have.steps) != len(want.steps):
        return [
            *lines,
            f"loop painting: {len(have.steps)} steps, {len(want.steps)} by the scheduler",
        ]
    for number, (one, other) in enumerate(zip(have.steps, want.steps, strict=True)):
        flat = [_flat(step) for step in (one, other)]
        close = flat[0].keys() == flat[1].keys() and all(
            abs(flat[0][key] - value) <= SAME * max(1, abs(value)) for key, value in flat[1].items()
        )
        if not close:
            lines.append(
                f"loop painting, step {number}: {one!r:.150}, by the scheduler {other!r:.150}"
            )
    return lines


def _flat(step: PaintStep) -> dict[str, float]:
    found = {"timestep": step.timestep}
    found |= {f"latents {n}": factor for n, factor in step.latents.items()}
    return found | {f"predictions {n}": factor for n, factor in step.predictions.items()}
