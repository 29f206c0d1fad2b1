"""Runs, and what a run is made of: its plan, model and subject."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arms import ARMS
from PIL import Image
from subjects import VIEWS
from torch import Tensor

from edge_dit.models.model import Model
from edge_dit.models.pipeline import load_pipeline
from edge_dit.pictures.dataset import Captioned, read_folder
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import Plan, model_of
from edge_dit.reference.evaluate import Whole, encode_whole


@dataclass(frozen=True)
class Run:
    """One arm on one subject with one seed.

    Attributes:
        job: job file: model, LoRA and optimizer; its images do not matter here.
        arm: its name in `arms.ARMS`.
        subject: folder of the subject, as `subjects.write_subject` writes it.
        seed: of LoRA, draws and generated pictures.
        steps: AdamW steps.
    """

    job: Path
    arm: str
    subject: Path
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.subject.name}-{self.seed}"


@dataclass(frozen=True)
class Subject:
    """A subject as a run needs it; one prompt a training image."""

    train: list[Captioned]
    prompts: list[dict[str, Tensor]]
    heldout: list[Whole]
    real: list[Image.Image]


@functools.cache
def plan_of(job: Path) -> Plan:
    return make_plan(read_job(job))


@functools.cache
def model_for(job: Path) -> Model:
    return model_of(plan_of(job), check=False)  # just hashed


@functools.cache
def pipeline_of(job: Path) -> Any:
    return load_pipeline(plan_of(job).model)


def plan_for(run: Run) -> Plan:
    """The job's plan with the run's sizes, steps and seed."""
    plan, arm = plan_of(run.job), ARMS[run.arm]
    rank = arm.rank if arm.rank and not arm.nested else plan.rank
    new = {
        "s_min": round(arm.patch * plan.s_max / plan.multiple) * plan.multiple,
        "steps": run.steps,
        # as many steps to a draw as the job has
        "draws": max(1, round(run.steps * arm.draws * plan.draws / plan.steps)),
        "seed": run.seed,
        "rank": rank,
        "alpha": plan.alpha * rank / plan.rank,
        "optimizer": replace(plan.optimizer, beta1=arm.beta1),
    }
    return plan.model_copy(update=new)


@functools.cache
def subject_of(job: Path, folder: Path) -> Subject:
    plan, model, pipeline = plan_of(job), model_for(job), pipeline_of(job)
    train, unseen = (read_folder(folder / part, None, plan.s_max) for part in VIEWS)
    captions = [image.caption for image in train]
    tokens = model.family.text_tokens(model.folder, captions)
    prompts = model.family.encode_prompts(pipeline, captions, tokens)
    real = [Image.open(folder / "heldout" / image.name).convert("RGB") for image in unseen]
    return Subject(train, prompts, encode_whole(plan, model, pipeline, unseen), real)
