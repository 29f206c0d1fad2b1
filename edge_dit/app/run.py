"""Runs all stages of a job, from a person's own pictures to an adapter.

    OUT/job.json    the job's keys as they were when the run began
    OUT/plan.json   which blocks train, and at which sizes
    OUT/bundle      the exported sub-graph, and its certificate
    OUT/bank        what the frozen blocks contribute to each draw
    OUT/run         the training run: losses, checkpoints
    OUT/lora        the adapter, for ``pipe.load_lora_weights``
    OUT/samples.png its pictures on the job's [model] use_on, if it has one

A stage that is done already is skipped, so the same command continues a run that was stopped.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_dit.app import api
from edge_dit.app.describe import plan_in_words
from edge_dit.app.planner import plan_job
from edge_dit.app.samples import write_samples
from edge_dit.app.verify_words import table, why_failed
from edge_dit.cluster.pool import Pool
from edge_dit.contract.adapter import loading_hint
from edge_dit.contract.adapter_formats import format_of
from edge_dit.contract.bundle import MANIFEST, Bundle, open_bundle
from edge_dit.contract.certificate import read_certificate
from edge_dit.contract.targets import INT8, RECOMPUTE, STREAMED, TARGETS, WIDE, variant_of
from edge_dit.errors import BadInput, CheckFailed
from edge_dit.pictures.dataset import Captioned
from edge_dit.planning.job import Job, read_job
from edge_dit.planning.make import changes, plan_of
from edge_dit.planning.plan import LOOP_TARGET, Plan, write_plan
from edge_dit.planning.prompts import loop_prompts
from edge_dit.planning.use_on import model_used
from edge_dit.store.documents import read_document, write_document
from edge_dit.store.files import cannot_write
from edge_dit_runtime.loop.measured import LOOP

if TYPE_CHECKING:
    from edge_dit_runtime.loop.previews import PreviewPainter

Say = Callable[[Any], None]
"""Prints a line or a table to the user."""


@dataclass(frozen=True)
class Road:
    """The folder that all stages of a job write to, and where each writes.

    Attributes:
        out: the folder.
        job: the job.
        plan: the job's plan.
        pictures: the job's pictures, in the plan's size.
    """

    out: Path
    job: Job
    plan: Plan
    pictures: list[Captioned]

    @property
    def bank(self) -> Path:
        """Folder of the bank."""
        return self.out / "bank"

    def looped(self, target: str) -> bool:
        """Whether a target's bundle has the loop's parts."""
        return self.plan.loop and variant_of(target).target == LOOP_TARGET

    def bundle(self, target: str) -> Path:
        """Folder of a target's bundle. A bundle of its own, for a run belongs to one bundle: a
        target that is added later must not change that of a run which is there.
        """
        return self.out / self._name("bundle", variant_of(target).target)

    def run(self, target: str) -> Path:
        """Folder of a target's training run: "run", or "run-<target>" if it is not the first."""
        return self.out / self._name("run", target)

    def lora(self, target: str) -> Path:
        """Folder of a target's adapter, named like `run`."""
        return self.out / self._name("lora", target)

    def _name(self, what: str, target: str) -> str:
        first = self.plan.targets[0]
        return what if target == first else f"{what}-{target.replace(':', '-')}"


def run(
    job_path: Path,
    out: Path,
    target: str | None,
    say: Say,
    any_memory: bool = False,
    pool: Pool | None = None,
) -> Road:
    """Run all stages of a job, or continue them.

    Args:
        job_path: the job file.
        out: folder for everything; new, or that of the same job.
        target: the one to train, "onnx" or "onnx:streamed"; default the plan's first.
        say: prints to the user.
        any_memory: train even if less memory is free than the layout is predicted to take.
        pool: a Ray cluster that makes the bank, unless the loop's parts do.

    Raises:
        BadInput: a stage refuses its input; or ``out`` belongs to another job, or to this one
            before it was changed.
        CheckFailed: the target does not compute what PyTorch computes.
        KeyboardInterrupt: training was stopped; the same command continues it.
    """
    road = begin(job_path, out, target, say)
    target = target or road.plan.targets[0]
    export(road, target)
    fill_bank(road, [target], say, pool)
    verify(road, target, say)
    lora = train(road, target, say, any_memory)
    say(f"the adapter: {lora}")
    say(f"load it: {loading_hint(lora, format_of(road.plan.family))}")
    if used := model_used(road.job):
        prompts = list(dict.fromkeys(picture.caption for picture in road.pictures))
        sheet = write_samples(used, lora, prompts, road.plan.s_max, road.out)
        say(f"pictures of it on {used.folder.name}: {sheet}")
    return road


def begin(
    job_path: Path, out: Path, target: str | None, say: Say, trained: Sequence[str] = ()
) -> Road:
    """Plan the job, or read the plan that is in ``out`` already.

    Args:
        job_path: the job file.
        out: folder for everything.
        target: the only one to plan for; None for the job's.
        say: prints to the user.
        trained: further targets, which the plan must export.

    Raises:
        BadInput: faults of the job; or ``out`` belongs to another job, or to this one before it was
            changed.
    """
    job = read_job(job_path)
    asked = {**job.asked(), "command.target": target or ""}
    stored = out / "job.json"
    if stored.is_file():
        _check_same(stored, asked)
    elif out.exists() and (not out.is_dir() or any(p.name[0] != "." for p in out.iterdir())):
        raise BadInput(
            out,
            found="not empty, and not the folder of a run",
            expected="a new or empty folder, or that of the same job",
            remedy="choose another -o",
        )
    if (out / "plan.json").is_file() and stored.is_file():
        plan = plan_of(job, out / "plan.json")
    else:
        planned = plan_job(job, targets=[target] if target else [])
        plan = planned.plan
        for name in [*trained, *([target] if target else [])]:
            exported_as(plan, name)  # before anything is written
        if target:
            plan = _for_one(plan, variant_of(target).target)
        for line in planned.in_words():
            say(line)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(out, error) from error
        write_document(stored, asked)
        write_plan(plan, out / "plan.json")
    for line in plan_in_words(plan):
        say(line)
    return Road(out, job, plan, api.read_pictures(job, plan))


def _for_one(plan: Plan, target: str) -> Plan:
    """A plan that exports one target only; the loop's parts are in `LOOP_TARGET` alone."""
    looped = {} if target == LOOP_TARGET else {"loop": False}
    return plan.model_copy(update={"targets": [target], **looped})


def exported_as(plan: Plan, target: str) -> str:
    """A target and layout as training takes them, "onnx" or "onnx:streamed".

    Args:
        plan: it decides how frozen matrices are stored, and whether there is a recomputing layout.
        target: "onnx", "onnx:streamed" or "onnx:streamed:int8".

    Raises:
        BadInput: unknown, or not what an export of the plan will hold; before any work is done.
    """
    variant = variant_of(target)
    name, *given = target.split(":")
    record = TARGETS[name]
    compute = plan.compute if plan.compute in record.computes else WIDE
    stored = plan.weights if plan.weights in record.layouts.get(STREAMED, ()) else WIDE
    stored = stored if compute == WIDE else INT8
    missing = compute == WIDE and stored not in record.layouts[variant.layout]
    wrong = (
        (len(given) > 1 and (variant.dtype, variant.compute) != (stored, compute))
        or (bool(given) and missing)
        or (variant.layout == RECOMPUTE and not plan.recompute)
    )
    if wrong:
        raise BadInput(
            "--target",
            found=f"{target}, which this job does not export",
            expected=f"a layout for [export] weights = {stored!r}, compute = {compute!r}, "
            f"recompute = {plan.recompute}",
            remedy="set weights, compute or recompute in the job's [export], or name another "
            "--target",
        )
    return ":".join([name, *given[:1]])


def _check_same(stored: Path, asked: dict[str, Any]) -> None:
    """Raise `BadInput` where the job is not the one that the folder was made for."""
    before = read_document(stored, "the folder of a run", "choose another -o")
    changed = [f"{key}: {old} -> {new}" for key, old, new in changes(before, asked)]
    if changed:
        raise BadInput(
            stored.parent,
            found=f"the folder of a run of another job ({'; '.join(changed)})",
            expected="the job that it was started with",
            remedy="choose another -o, or undo the change",
        )


def export(road: Road, target: str) -> Bundle:
    """Export the bundle of a target, unless that is done already."""
    folder, name = road.bundle(target), variant_of(target).target
    if (folder / MANIFEST).is_file():
        bundle = open_bundle(folder)
        same = bundle.manifest.plan == road.plan.shared()
        if same and list(bundle.manifest.targets) == [name]:
            return bundle
    return api.export(road.plan, folder, [name], job=road.job)


def fill_bank(road: Road, targets: Sequence[str], say: Say, pool: Pool | None = None) -> None:
    """Make the bank: on the device, if a target's bundle has the loop's parts, of one folder and
    without prior draws; else by torch.
    """
    looped = next((name for name in targets if road.looped(name)), None)
    if looped is None or road.job.data.subjects or road.job.prior.prompt:
        api.precompute(road.plan, road.pictures, road.bank, pool=pool)
        return
    data = road.job.data
    recursive = ["--recursive"] if data.recursive else []
    images = ["--images", str(data.images), *recursive]
    on_device(say, "collect", str(road.bundle(looped)), *images, "-o", str(road.bank))


def verify(road: Road, target: str, say: Say) -> None:
    """Verify the bundle of a target, unless that is done already.

    Raises:
        CheckFailed: the target does not compute what PyTorch computes.
    """
    bundle, name = open_bundle(road.bundle(target)), variant_of(target).target
    certificate = read_certificate(bundle)
    titles = {bundle.titled(name, layout) for layout in bundle.layouts(name)}
    titles |= {f"{name} ({LOOP})"} if road.looped(target) else set()
    if certificate is None or not titles <= set(certificate.targets) or not certificate.passed:
        certificate = api.verify(bundle.folder, road.bank, images=road.pictures)
    say(table(certificate))
    if not certificate.passed:
        raise CheckFailed(why_failed(certificate))


HIDDEN = ("torch", "diffusers", "transformers", "peft", "onnx", "onnxscript", "executorch")
"""Modules that a device does not have."""
_ON_DEVICE = f"""
import sys
sys.modules.update(dict.fromkeys({HIDDEN!r}))
from edge_dit.cli import main
main()
"""


def on_device(say: Say, *arguments: str) -> None:
    """Run a command of edge-dit as a device does: in a process that cannot import torch.

    Args:
        say: is told what it prints.
        arguments: of the command line.

    Raises:
        BadInput: it ended with an error, which it printed itself.
        KeyboardInterrupt: Ctrl-C stopped it.
    """
    command = [sys.executable, "-c", _ON_DEVICE, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    for line in done.stdout.splitlines():
        say(line)
    if done.returncode in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if done.returncode:
        raise BadInput(
            f"edge-dit {arguments[0]}",
            found=f"it ended with exit code {done.returncode}",
            expected="that it runs without torch, as on a device",
            remedy="see its message above",
        )


def _painter(road: Road) -> PreviewPainter | None:
    """What paints a run's previews on this machine, if the job asks for some."""
    if not road.plan.preview_every:
        return None
    from edge_dit.reference.previews import PipelinePainter

    prompts = loop_prompts(road.job)
    return PipelinePainter(road.plan, [prompts.texts[number] for number in prompts.previews])


def train(road: Road, target: str, say: Say, any_memory: bool = False) -> Path:
    """Train one target, or continue its run; the folder of its LoRA.

    Raises:
        BadInput: too little memory is free, unless ``any_memory``.
        KeyboardInterrupt: Ctrl-C stopped it, with a checkpoint.
    """
    import edge_dit_runtime as er
    from edge_dit_runtime.run_folder import RUN

    run = road.run(target)
    bundle, resume = road.bundle(target), (run / RUN).is_file()
    name = exported_as(road.plan, target)
    if road.looped(target):
        more = [*["--resume"] * resume, *["--any-memory"] * any_memory]
        places = ["--bank", str(road.bank), "-o", str(run)]
        on_device(say, "train", str(bundle), *places, "--target", name, *more)
    else:
        done = er.train(
            bundle,
            road.bank,
            run,
            target=name,
            resume=resume,
            any_memory=any_memory,
            painter=_painter(road),
        )
        if done.done < done.steps:
            raise KeyboardInterrupt  # training stops at the first Ctrl-C, and so do later stages
    lora = road.lora(target)
    if not (lora / format_of(road.plan.family).file).is_file():
        er.save_lora(run, lora)
    return lora
