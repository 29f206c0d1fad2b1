"""The Python API of the host: what ``import edge_dit as ed`` shows, and what the commands call.

Every function takes paths as text or `Path`. docs/api.md walks from a job to an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from edge_dit.contract.bank import Bank
from edge_dit.contract.targets import check_targets
from edge_dit.errors import BadInput, require
from edge_dit.planning.job import Job
from edge_dit.planning.job import read_job as _read_job
from edge_dit.planning.plan import Plan
from edge_dit.planning.split import SplitRequest
from edge_dit.progress import warn
from edge_dit.store.files import StrPath

if TYPE_CHECKING:
    from edge_dit.cluster.pool import Pool
    from edge_dit.contract.bundle import Bundle
    from edge_dit.contract.certificate import Certificate
    from edge_dit.pictures.dataset import Captioned


def read_job(path: StrPath) -> Job:
    """Read a job file (docs/jobs.md).

    Raises:
        BadInput: unreadable, not TOML, or (as `ManyFaults`) every fault with its line.

    Example:
        >>> job = ed.read_job("job.toml")
        >>> job.train.patch
        32
    """
    return _read_job(Path(path))


def plan(
    job: Job,
    *,
    ram: str | None = None,
    flash: str | None = None,
    step_time: str | None = None,
    skip_ratio: float | None = None,
    targets: Sequence[str] = (),
) -> Plan:
    """Choose which blocks to train, at which sizes.

    Without a budget the job decides. With a budget, from these arguments or else from the job, this
    is the best plan that fits (docs/selection.md). Warns of pictures without a caption of their
    own, and of all that is left out of the folder (docs/inputs.md).

    Args:
        job: from `read_job`.
        ram: most memory of a training process, "3GiB".
        flash: most storage of bundle and bank, "2GiB".
        step_time: longest training step, "5s".
        skip_ratio: share of blocks to skip, in [0, 1); not together with a budget.
        targets: to choose from, or their layouts ("onnx:streamed"); default the job's.

    Raises:
        BadInput: faults of job, model and pictures, together; a size or time that is
            none; or nothing fits the budget.

    Example:
        >>> plan = ed.plan(job)
        >>> plan.trained
        [1, 2]
        >>> ed.plan(job, ram="1GiB", targets=["onnx"]).targets
        ['onnx']
    """
    from edge_dit.app.planner import plan_job, read_limits

    limits = read_limits(ram, flash, step_time)
    request = SplitRequest(skip_ratio=skip_ratio)
    planned = plan_job(job, request, limits=limits, targets=targets)
    for line in planned.left_out():
        warn(line)
    return planned.plan


def read_pictures(job: Job, plan: Plan) -> list[Captioned]:
    """A job's pictures in the size of its plan, with captions; warns of enlarged ones. The base
    model draws those of a prior that asks for some, unless it has drawn them before.

    A picture is decoded when its ``pixels`` are asked for; a few stay in memory.

    Raises:
        BadInput: every picture that is none or truncated, and every missing caption, together; or
            the job changed since its plan.

    Example:
        >>> pictures = ed.read_pictures(job, plan)
        >>> len(pictures), pictures[0].pixels.shape
        (3, (3, 64, 64))
    """
    from edge_dit.pictures.dataset import LISTED, read_folders, with_prior
    from edge_dit.planning.make import check_unchanged

    check_unchanged(job, plan, "plan")
    pictures = read_folders(job.data.folders(), plan.s_max)
    small = [picture.name for picture in pictures if picture.upscaled]
    for name in small[:LISTED]:
        warn(f"{name} is smaller than {plan.s_max} px and was enlarged")
    if len(small) > LISTED:
        warn(f"and {len(small) - LISTED} more pictures are")
    if not job.prior.prompt:
        return pictures
    drawn = _drawn_for_prior(job, plan) if job.prior.images else []
    return with_prior(pictures, job.prior.prompt, job.prior.weight, drawn)


def read_prior(job: Job, plan: Plan) -> list[Captioned]:
    """The base model's own pictures for a job's prior draws. A bank of them alone has nobody's
    pictures: it can be shipped with the bundle, for ``er.collect(..., prior=...)``.

    Raises:
        BadInput: the job asks for no such pictures, or changed since its plan.

    Example:
        >>> api.precompute(plan, api.read_prior(job, plan), "prior")
    """
    from edge_dit.pictures.dataset import with_prior
    from edge_dit.planning.make import check_unchanged

    check_unchanged(job, plan, "plan")
    if not job.prior.images:
        raise BadInput(
            "prior.images",
            found="none",
            expected="pictures that the base model draws: those of a subject are not shipped",
            remedy="put images = 16 under [prior] and plan again",
        )
    return with_prior([], job.prior.prompt, job.prior.weight, _drawn_for_prior(job, plan))


def _drawn_for_prior(job: Job, plan: Plan) -> list[Captioned]:
    """Pictures that the base model draws for a prior, unless it has drawn them before."""
    require("torch", "drawing pictures for the prior")
    from edge_dit.pictures.dataset import read_folder
    from edge_dit.planning.plan import model_of
    from edge_dit.reference.prior import base_pictures

    prior = job.prior
    folder = base_pictures(model_of(plan), prior.prompt, prior.images, plan.s_max)
    return read_folder(folder, None, plan.s_max)


def precompute(
    plan: Plan, pictures: list[Captioned], folder: StrPath, *, pool: Pool | None = None
) -> Bank:
    """Store what the frozen blocks contribute to every draw; a bank that was stopped is continued.

    Args:
        plan: from `plan`.
        pictures: from `read_pictures`.
        folder: where the bank goes.
        pool: a Ray cluster that computes it, from `edge_dit.cluster.pool.connected`.

    Raises:
        BadInput: the folder holds another bank; the model changed since the plan, or is damaged;
            torch is not installed.

    Example:
        >>> bank = ed.precompute(plan, pictures, "bank")
        >>> len(bank), bank[0]["entry"].dtype
        (10, dtype('float32'))
    """
    require("torch", "precompute")
    from edge_dit.reference.precompute import precompute

    precompute(plan, pictures, Path(folder), pool)
    return Bank(Path(folder), plan.identity())


def export(
    plan: Plan,
    folder: StrPath,
    targets: Sequence[str] | None = None,
    *,
    job: Job | None = None,
    version: int = 1,
) -> Bundle:
    """Write the trainable sub-graph, the optimizer and the patch sampler for every target.

    Args:
        plan: from `plan`.
        folder: where the bundle goes; written whole, or not at all.
        targets: some of "onnx", "ort-training" and "executorch"; default the plan's.
        job: of the plan; a plan with a loop needs it for its prompts.
        version: of the bundle: count up, if devices are to refuse older ones (SECURITY.md).

    Raises:
        BadInput: a target's packages are missing, the model changed, ``folder`` holds something
            else; or the loop's parts are wanted and cannot be exported.

    Example:
        >>> bundle = ed.export(plan, "bundle", ["onnx"])
        >>> bundle.layouts("onnx")
        ['fused', 'streamed']
    """
    check_targets(list(targets or []))
    require("torch", "export")
    from edge_dit.planning.prompts import loop_prompts
    from edge_dit_export.export import export
    from edge_dit_export.targets.loop_source import loop_source

    loop = partial(loop_source, prompts=loop_prompts(job)) if plan.loop and job else None
    return export(plan, Path(folder), list(targets or plan.targets), loop=loop, version=version)


def verify(
    bundle: StrPath,
    bank: StrPath,
    *,
    steps: int = 20,
    targets: Sequence[str] | None = None,
    model: StrPath | None = None,
    planned: Plan | None = None,
    images: StrPath | Sequence[Captioned] | None = None,
) -> Certificate:
    """Compare every target of a bundle with PyTorch; the certificate is written into the bundle,
    unless that is signed: its signature covers the certificate that is there.

    Args:
        bundle: from `export`.
        bank: its bank.
        steps: length of the training trajectory that is compared.
        targets: some of the bundle's; default all.
        model: folder of the model the bundle was made from; default where it was last planned for
            on this machine. Its hash must be the bundle's.
        planned: the plan that the bundle should be of; default the one in its manifest.
        images: the pictures that the bank was made of, from `read_pictures`, or their folder:
            stored draws are then compared with them too (docs/verify.md, "The bank").

    Raises:
        BadInput: bundle and bank do not fit, the model is not known or another one, ``images``
            holds none of the bank's pictures, or torch is missing.
        CheckFailed: too few draws can be compared.

    Example:
        >>> certificate = ed.verify("bundle", "bank", steps=2)
        >>> certificate.passed, sorted(certificate.targets)
        (True, ['onnx', 'onnx (streamed)'])
    """
    from edge_dit.app.verify import verify

    folder = Path(model) if model else None
    pictures = Path(images) if isinstance(images, str | PathLike) else images
    return verify(Path(bundle), Path(bank), steps, targets, folder, planned, pictures)
