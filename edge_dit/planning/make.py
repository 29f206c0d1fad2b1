"""A job -> its plan: open the model, choose the split, check everything, fill in the plan."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_dit.contract.adamw import AdamW
from edge_dit.contract.names import STORED, Tail
from edge_dit.contract.targets import compute_faults, tail_faults
from edge_dit.errors import BadInput, raise_any
from edge_dit.models.families import FAMILIES, family_of
from edge_dit.models.model import Model, open_model
from edge_dit.models.source import Located, locate
from edge_dit.models.whereabouts import remember
from edge_dit.pictures.dataset import Survey, captions_of, survey
from edge_dit.planning.job import Job
from edge_dit.planning.plan import Plan, loop_faults, read_plan
from edge_dit.planning.prompts import job_prompts, loop_prompts
from edge_dit.planning.selection import find_selection
from edge_dit.planning.split import Split, SplitRequest, choose_split, requested, size_faults
from edge_dit.planning.use_on import use_faults

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Made:
    """A plan, and what was found in each subject's folder of pictures."""

    plan: Plan
    pictures: list[Survey]


def make_plan(job: Job, request: SplitRequest | None = None) -> Plan:
    """`make`, for those who need the plan alone."""
    return make(job, request).plan


def make(job: Job, request: SplitRequest | None = None) -> Made:
    """Plan a job.

    Where only a ratio of skipped blocks is asked for, the model's selection decides which ones
    (`edge_dit.planning.selection.find_selection`), if it has one.

    Args:
        job: from job.toml.
        request: a split that overrides the job's.

    Raises:
        BadInput: all faults between job, model and pictures, together.
    """
    from edge_dit.models.health import model_faults  # imports torch

    source = _located(job)
    raise_any(source.folder, model_faults(source.folder, job.model.variant))
    model = open_model(source.folder, job.model.variant)
    selection, _ = find_selection(model.folder, model.hash)
    tail = job.plan.tail or STORED
    selection = selection and selection.for_tail(tail)
    split = choose_split(model.layers, requested(job.plan, request), selection)
    sizes = {"train.patch": job.train.patch, "train.resolution": job.train.resolution}
    faults = [*split.faults, *size_faults(sizes, model.size_step)]
    faults += model.family.grid_faults(model.config, sizes, model.multiple)
    faults += window_faults(job.train.window, model)
    faults += surroundings_faults(job, model) if job.train.surroundings else []
    faults += lora_faults(model, split, job.train.lora_targets, tail)
    faults += tail_faults(tail, dict.fromkeys(job.export.targets)) if split.tail_skip else []
    faults += use_faults(job, model)
    pictures, captions, masked = [], [], False
    weighted = job.prior.weight != 1 and bool(job.prior.prompt)
    for subject in job.data.folders():
        try:
            found = survey(subject.images, subject.recursive, subject.folder_repeats)
            captions += captions_of(found, subject)
        except BadInput as fault:
            faults.append(fault)
            continue
        pictures.append(found)
        names = found.listing.pictures
        weighted |= any(found.counts(name, subject).weight != 1 for name in names)
        masked |= bool(found.masks) or subject.alpha_masks
    faults += compute_faults(job.export.weights, job.export.compute, job.export.targets)
    faults += loop_faults(job.export.loop, job.export.targets, job.train.surroundings)
    raise_any("job", faults)
    encoded = set(job_prompts(job, captions))
    if job.export.loop:
        encoded |= {*loop_prompts(job, captions).all, model.family.negative_prompt}
    remember(model.folder, model.hash)
    plan = _plan(job, source, model, split, tail, encoded)
    return Made(plan.model_copy(update={"weighted": weighted, "masked": masked}), pictures)


def window_faults(window: bool, model: Model) -> list[BadInput]:
    """A fault if patches are to be windows and cannot be."""
    if not window or model.family.placed is not None:
        return []
    able = [name for name in FAMILIES if family_of(name).placed is not None]
    return [
        BadInput(
            "train.window",
            found=f"windows of a {model.family.name} model",
            expected=f"a model of {', '.join(able)}: others' positions cannot be cut yet",
            remedy="remove window: patches are then crops of the pictures",
        )
    ]


def surroundings_faults(job: Job, model: Model) -> list[BadInput]:
    """Why blocks cannot be given what is around a window, if they cannot."""
    able = [name for name in FAMILIES if family_of(name).surroundings is not None]
    faults = [
        (
            model.family.surroundings is None,
            f"surroundings with a {model.family.name} model",
            f"a model of {' or '.join(able)}: others' blocks cannot be given them yet",
        ),
        (
            not job.train.window,
            "surroundings of crops",
            "window = true: around a crop the model saw nothing",
        ),
    ]
    return [
        BadInput(
            "train.surroundings",
            found=found,
            expected=expected,
            remedy="remove surroundings: patches then train without them",
        )
        for is_fault, found, expected in faults
        if is_fault
    ]


def _plan(
    job: Job, source: Located, model: Model, split: Split, tail: Tail, prompts: set[str]
) -> Plan:
    """The plan of a job without faults.

    Args:
        job: from job.toml.
        source: where its model is from.
        model: opened.
        split: which blocks train.
        tail: what takes the place of skipped last blocks.
        prompts: that are encoded.
    """
    return Plan(
        family=model.family.name,
        model=model.folder,
        model_name=source.name,
        model_revision=source.revision,
        model_variant=model.variant,
        model_hash=model.hash,
        layers=model.layers,
        head_skip=split.head_skip,
        tail_skip=split.tail_skip,
        inner_skips=list(split.inner_skips),
        tail=tail if split.tail_skip else STORED,
        s_min=job.train.patch,
        window=job.train.window,
        surroundings=job.train.surroundings,
        s_max=job.train.resolution,
        multiple=model.multiple,
        text_tokens=model.family.text_tokens(model.folder, sorted(prompts)),
        rank=job.train.rank,
        alpha=_alpha(job),
        lora_targets=list(dict.fromkeys(job.train.lora_targets or model.family.lora_targets)),
        optimizer=AdamW(
            lr=job.train.lr,
            beta1=job.train.beta1,
            loraplus_lr_ratio=job.train.loraplus_lr_ratio,
        ),
        steps=job.train.steps,
        draws=job.train.draws,
        seed=job.train.seed,
        schedule=job.train.schedule,
        warmup=job.train.warmup,
        accumulate=job.train.accumulate,
        ema=job.train.ema,
        preview_every=job.train.preview_every,
        prior_share=job.prior.share if job.prior.prompt else 0.0,
        targets=list(dict.fromkeys(job.export.targets)),
        weights=job.export.weights,
        compute=job.export.compute,
        recompute=job.export.recompute,
        loop=job.export.loop,
        bank_dtype=job.train.bank,
        asked=job.asked(),
    )


def _alpha(job: Job) -> float:
    """Alpha of the plan's LoRA, whose scale is alpha / rank in every reader."""
    train = job.train
    alpha = float(train.rank) if train.alpha is None else train.alpha
    return alpha * train.rank**0.5 if train.rank_stabilized else alpha


def plan_of(job: Job, path: Path) -> Plan:
    """Read a plan for a later stage of its job. The model lies where the job says now.

    Args:
        job: that was planned.
        path: of plan.json.

    Raises:
        BadInput: not a plan; or the job was changed since, with every key that was.
    """
    plan = read_plan(path)
    check_unchanged(job, plan, path)
    return plan.model_copy(update={"model": _located(job, plan.model_revision).folder})


def check_unchanged(job: Job, plan: Plan, where: object) -> None:
    """Raise `BadInput` with every key of a job that changed since its plan.

    Args:
        job: as it is now.
        plan: of the job.
        where: the plan was read, for the message.
    """
    if changed := changes(plan.asked, job.asked()):
        raise BadInput(
            where,
            found="the plan of another job, or of this one before it was changed: "
            + "; ".join(f"{key}: the plan says {old}, the job {new}" for key, old, new in changed),
            expected="the job as it was planned",
            remedy="plan again: edge-dit plan JOB -o plan.json; or undo the change",
        )


def _located(job: Job, revision: str | None = None) -> Located:
    """The job's model on this machine; of the hub the revision that was planned, if one was."""
    asked = job.model
    if not isinstance(asked.path, str):
        revision = None
    return locate(asked.path, revision or asked.revision, asked.variant, asked.config)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Keys of a job that differ, with both values as text.

    Args:
        before: keys that were written down. One that is lacking had its default: an older edge-dit
            did not know it.
        now: all keys.
    """
    before = {**Job.defaults(), **before}

    def shown(keys: Mapping[str, Any], key: str) -> str:
        return "nothing" if keys.get(key) is None else repr(keys[key])

    both = sorted(before.keys() | now.keys())
    pairs = [(key, shown(before, key), shown(now, key)) for key in both]
    return [(key, old, new) for key, old, new in pairs if old != new]


def lora_faults(
    model: Model, split: Split, asked: list[str] | None, tail: Tail = STORED
) -> list[BadInput]:
    """What is wrong with the modules that should carry LoRA.

    Args:
        model: of the job.
        split: which blocks train; if it has faults, only the names are checked.
        asked: modules within a block; None for the family's default, which need not be in every
            model of the family.
        tail: what takes the place of the blocks after the last trained one.
    """
    from edge_dit.models.subgraph import lora_modules

    transformer = model.meta()
    known = modules_within_a_block(model, transformer)
    faults = [
        _unknown(target, known) for target in dict.fromkeys(asked or ()) if target not in known
    ]
    if faults or split.faults:
        return faults
    trained = split.trained
    targets = asked or model.family.lora_targets
    if not lora_modules(model.family, transformer, trained, targets, tail):
        faults.append(
            BadInput(
                "train.lora_targets",
                found="none of them is in a trained block, or all feed only its text output",
                expected=f"a module that blocks {trained[0]} to {trained[-1]} train",
                remedy="name other modules, or skip other blocks",
            )
        )
    return faults


def modules_within_a_block(model: Model, transformer: nn.Module) -> list[str]:
    """Names of all modules that can carry LoRA, in order of appearance."""
    from edge_dit.models.subgraph import can_carry_lora

    names = dict.fromkeys(
        name
        for block in model.family.blocks(transformer).values()
        for name, module in block.named_modules()
        if can_carry_lora(module)
    )
    return list(names)


def _unknown(target: str, known: list[str]) -> BadInput:
    near = difflib.get_close_matches(target, known)
    return BadInput(
        "train.lora_targets",
        found=f"no module {target!r} in a block",
        expected=f"some of {', '.join(known)}",
        remedy=f"did you mean {' or '.join(near)}?" if near else "",
    )
