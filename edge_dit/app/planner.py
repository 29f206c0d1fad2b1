"""From a job to its plan: as the job says, or the best within a budget.

It joins `edge_dit.planning.plan` (what a plan is), `edge_dit.planning.selection` (which blocks
matter), `edge_dit.budget.footprint` (what training takes) and `edge_dit.budget.search` (what fits).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from edge_dit.budget.limits import NO_LIMITS, Limits
from edge_dit.budget.quality import Terms, quality, terms_of
from edge_dit.contract.targets import RECOMPUTE, TARGETS, WIDE, TargetVariant, tail_faults
from edge_dit.errors import BadInput
from edge_dit.pictures.dataset import Survey, read_folders
from edge_dit.planning.doubts import doubts, unused_prompts
from edge_dit.planning.job import Job, bytes_of
from edge_dit.planning.make import make, make_plan
from edge_dit.planning.plan import Plan, model_of
from edge_dit.planning.selection import Selection, cache_file, find_selection, write_selection
from edge_dit.planning.split import RATIO_PLACE, SplitRequest, choose_split
from edge_dit.progress import warn
from edge_dit.store.files import cache_folder
from edge_dit.text import seconds_of, size

if TYPE_CHECKING:
    from edge_dit.budget.footprint import Footprint, Profile
    from edge_dit.budget.search import Choice
    from edge_dit.cluster.pool import Pool


@dataclass(frozen=True)
class Planned:
    """A plan and why it is this one.

    Attributes:
        plan: the job's plan.
        selection: which blocks matter, if it was measured for this model.
        source: where the selection was found, or why there is none.
        choice: the result of the search, if there was a budget.
        limits: that budget.
        footprints: what training is expected to take, by `TargetVariant` in words; with a budget
            only that of the chosen variant.
        pictures: what was found in each folder of pictures, and what was left out.
        doubts: see `edge_dit.planning.doubts`; `plan_job` has printed them as warnings.
    """

    plan: Plan
    selection: Selection | None
    source: str
    choice: Choice | None
    limits: Limits | None
    footprints: dict[str, Footprint]
    pictures: list[Survey]
    doubts: list[str]

    def in_words(self) -> list[str]:
        """Selection, choice or footprints, and pictures as lines for people."""
        lines = [f"blocks by {self.source}" if self.selection else f"split: {self.source}"]
        skipped = self.plan.layers - len(self.plan.trained)
        better = self.selection.proposed(skipped) if self.selection else None
        if better and self.plan.inner_skips == [better.run]:
            lines.append(better.in_words())
        terms = self.terms
        kept = [] if terms is None else [quality().in_words(terms)]
        if self.choice is not None:
            return [*lines, *self.choice.in_words(), *kept, *self.pictures_in_words()]
        for name, takes in self.footprints.items():
            lines.append(
                f"{name}: about {size(takes.anonymous)} anonymous and {size(takes.file)} of files, "
                f"{takes.seconds:.2g} s a step, bundle {size(takes.bundle)}"
            )
        return [*lines, *kept, *self.pictures_in_words()]

    @property
    def terms(self) -> Terms | None:
        """What the plan gives up, if skipping its blocks was measured."""
        return self.selection and terms_of(self.plan, self.selection)

    def pictures_in_words(self) -> list[str]:
        """What was found in each folder of pictures, as lines for people."""
        lines = bool(self.plan.asked.get("data.caption_lines"))
        return [line for found in self.pictures for line in found.in_words(lines)]

    def left_out(self) -> list[str]:
        """`pictures_in_words` but for their first lines, which count what was found."""
        lines = bool(self.plan.asked.get("data.caption_lines"))
        return [line for found in self.pictures for line in found.in_words(lines)[1:]]

    def names(self) -> list[str]:
        """Names of all pictures in the order in which they take turns."""
        return [name for found in self.pictures for name in found.listing.pictures]


def plan_job(
    job: Job,
    request: SplitRequest | None = None,
    *,
    limits: Limits | None = None,
    targets: Sequence[str] = (),
    profile: Profile | None = None,
) -> Planned:
    """Plan a job.

    Args:
        job: from job.toml.
        request: a split that overrides the job's; a budget keeps its head and tail.
        limits: a budget; default the job's, if it has one and ``request`` no ratio.
        targets: to choose from, or their layouts ("onnx:streamed"); default the job's.
        profile: of the device; default this machine, measured for a second.

    Raises:
        BadInput: faults of the job; a ratio together with a budget; or nothing fits the budget.
    """
    from edge_dit.budget.footprint import calibrated
    from edge_dit.budget.search import variants_of

    asked = request or SplitRequest()
    if limits is None and asked.skip_ratio is None:
        limits = limits_of(job)
    if limits is not None and asked.skip_ratio is not None:
        raise BadInput(
            RATIO_PLACE,
            found="given together with a budget",
            expected="either how many blocks to skip, or a budget that decides it",
            remedy="leave one out; a head and tail to skip may stay",
        )
    profile = profile or calibrated()
    if limits is not None:
        planned = _plan_within(job, asked, limits, targets, profile)
    else:
        made = make(job, asked)
        plan = made.plan
        selection, source = _selection_of(plan)
        footprints = _footprints(plan, profile, variants_of(targets or plan.targets, plan.compute))
        planned = Planned(plan, selection, source, None, None, footprints, made.pictures, [])
    from edge_dit.models.families import family_of  # imports torch

    guided = bool(family_of(planned.plan.family).guided_by)
    found = doubts(job.train, planned.names())
    found += unused_prompts(job.export, guided)
    for doubt in found:
        warn(doubt)
    return replace(planned, doubts=found)


def read_limits(ram: str | None, flash: str | None, step_time: str | None) -> Limits | None:
    """A budget in words as limits; None where nothing is limited.

    Args:
        ram: "3GiB".
        flash: "2GiB".
        step_time: "5s".

    Raises:
        BadInput: one that is no size or time.
    """
    asked = {
        "ram": ("ram (--ram)", ram, bytes_of),
        "flash": ("flash (--flash)", flash, bytes_of),
        "seconds": ("step_time (--step-time)", step_time, seconds_of),
    }
    limits = {n: _read(where, w, read) for n, (where, w, read) in asked.items() if w is not None}
    return Limits(**limits) if limits else None


def read_size(where: str, words: str) -> int:
    """Bytes of "512MiB".

    Args:
        where: it was given, for the message.
        words: the size.

    Raises:
        BadInput: it is none.
    """
    return int(_read(where, words, bytes_of))


def _read(where: str, words: str, read: Callable[[str], float]) -> float:
    try:
        return read(words)
    except ValueError as error:
        raise BadInput(where, found=repr(words), expected=str(error)) from None


def limits_of(job: Job) -> Limits | None:
    """The job's budget, if it has one."""
    asked = job.plan
    if not (asked.ram or asked.flash or asked.step_time):
        return None
    return Limits(asked.ram or inf, asked.flash or inf, asked.step_time or inf)


def _selection_of(plan: Plan) -> tuple[Selection | None, str]:
    return find_selection(model_of(plan, check=False).folder, plan.model_hash)


def _plan_within(
    job: Job, asked: SplitRequest, limits: Limits, targets: Sequence[str], profile: Profile
) -> Planned:
    from edge_dit.budget.search import bounds_of, plan_within, variants_of

    made = make(job, SplitRequest(skip_ratio=0.0))
    whole = made.plan
    selection, source = _selection_of(whole)
    head = job.plan.head_skip if asked.head_skip is None else asked.head_skip
    tail = job.plan.tail_skip if asked.tail_skip is None else asked.tail_skip
    kept = SplitRequest(head_skip=head or 0, tail_skip=tail or 0)
    if faults := choose_split(whole.layers, kept).faults:
        raise faults[0]
    variants = _that_compute(whole, variants_of(targets or whole.targets, whole.compute))
    names = {variant.target for variant in variants}
    refused = tail_faults(job.plan.tail, sorted(names)) if job.plan.tail else []
    if tail != 0 and len(refused) == len(names):
        raise refused[0]
    bounds = bounds_of(whole, head, tail, job.plan.tail)
    plan, choice = plan_within(whole, bounds, limits, profile, variants, selection)
    footprints = {str(choice.best.option.variant): choice.best.footprint}
    return Planned(plan, selection, source, choice, limits, footprints, made.pictures, [])


def _that_compute(plan: Plan, variants: Sequence[TargetVariant]) -> list[TargetVariant]:
    """Those of ``variants`` that compute as the job asks for; all, where it asks for nothing.

    Raises:
        BadInput: none does.
    """
    able = [v for v in variants if plan.compute in (WIDE, v.compute)]
    if not able:
        raise BadInput(
            "export.compute",
            found=f"{plan.compute}, with a budget for {', '.join(map(str, variants))}",
            expected="a target that computes so",
            remedy="name another target, or leave compute out",
        )
    return able


def _footprints(
    plan: Plan, profile: Profile, variants: Sequence[TargetVariant]
) -> dict[str, Footprint]:
    """Footprints of those variants that an export of the plan has."""
    from edge_dit.budget.footprint import footprints_of

    footprints = footprints_of(plan, profile)
    return {
        str(variant): footprints.of(tuple(plan.trained), plan.rank, variant, plan.tail)
        for variant in variants
        if _exports(plan, variant)
    }


def _exports(plan: Plan, variant: TargetVariant) -> bool:
    """Whether a plan's bundle has a variant."""
    compute = plan.compute if plan.compute in TARGETS[variant.target].computes else WIDE
    dtype = plan.weights if variant.target == "onnx" or compute != WIDE else WIDE
    layout = variant.layout != RECOMPUTE or plan.recompute
    return layout and (variant.dtype, variant.compute) == (dtype, compute)


def report_on(job: Job, planned: Planned, path: Path) -> None:
    """Write a plan as an HTML page, see `edge_dit.app.report`.

    Args:
        job: the job of the plan.
        planned: from `plan_job`.
        path: the page.
    """
    from edge_dit.app import report
    from edge_dit.budget.footprint import read_measured

    plan = planned.plan
    images = read_folders(job.data.folders(), plan.s_max)
    expected = [
        report.Expected(name, f.anonymous, f.file, f.bundle + plan.draws * f.draw, f.seconds)
        for name, f in planned.footprints.items()
    ]
    machine, measured = read_measured()
    page = report.Page(
        model=plan.model_name,
        plan=plan,
        expected=expected,
        budget=planned.limits or NO_LIMITS,
        reasons=[_without_folders(line.strip(), plan) for line in planned.in_words()],
        selection=planned.selection,
        memory=report.memory_by_role(plan, planned.selection),
        measured=measured,
        machine=machine,
        samples=report.sample_patches(plan, images),
        quality=quality(),
        kept=None if planned.terms is None else quality().kept(planned.terms),
    )
    report.write_report(path, page)


def _without_folders(line: str, plan: Plan) -> str:
    """A line for a page that is passed on: it names no folder of this machine."""
    model = model_of(plan, check=False).folder
    return line.replace(str(model), plan.model_name).replace(str(cache_folder()), "CACHE")


def select(
    job: Job,
    method: str,
    subjects: Path | None = None,
    embedding: str | None = None,
    pool: Pool | None = None,
) -> Path:
    """Measure which blocks of a job's model may be skipped, and write the selection.

    A measurement that was stopped is continued.

    Args:
        job: its model, LoRA and optimizer are used.
        method: "generation", the paper's; or "loss", which generates no pictures.
        subjects: folder with a folder of images for each subject, see
            `edge_dit.select.subjects.read_subjects`; default the job's images as the only subject.
        embedding: with "generation", folder or hub id of DINO, DINOv2 or CLIP; default the model's
            own autoencoder.
        pool: a Ray cluster that tunes and measures.

    Returns:
        The file that the selection was written to; plans of this model find it there.

    Raises:
        BadInput: no images, an unknown method, or an embedding that cannot be loaded.
    """
    from edge_dit.select.selectors import Drawn, select_by_generation, select_by_loss
    from edge_dit.select.subjects import read_subject, read_subjects

    if method not in ("generation", "loss"):
        raise BadInput("--method", found=method, expected="generation or loss")
    if embedding is not None and method != "generation":
        raise BadInput("--embedding", found=f"with --method {method}", expected="generation")
    plan = make_plan(job, SplitRequest(skip_ratio=0.0))
    data = job.data
    if subjects is None:
        name = data.images.parent.name
        chosen = [read_subject(name, data.images, data.prompt, plan.s_max, data.recursive)]
    else:
        chosen = read_subjects(subjects, data.prompt, plan.s_max, data.recursive)
    path = cache_file(plan.model_hash)
    work = path.with_suffix("")
    if method == "generation":
        selection = select_by_generation(plan, chosen, work, drawn=Drawn(embedding), pool=pool)
    else:
        selection = select_by_loss(plan, chosen, work, pool=pool)
    return write_selection(selection, path)
