"""The whole road on the shipped sample, with pictures before and after."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_dit.app.describe import plan_in_words
from edge_dit.app.planner import plan_job
from edge_dit.contract.adapter import write_adapter_folder
from edge_dit.contract.bundle import open_bundle
from edge_dit.errors import BadInput, CheckFailed
from edge_dit.models.families import PEFT_ONLY
from edge_dit.models.pipeline import load_pipeline
from edge_dit.pictures.images import Captioned, read_folder
from edge_dit.planning.job import read_job
from edge_dit.planning.plan import Plan, model_of, write_plan
from edge_dit.reference.contact_sheet import contact_sheet
from edge_dit.reference.evaluate import adapted, encode_whole, heldout_loss
from edge_dit.reference.full_lora import train_full_lora
from edge_dit.reference.precompute import precompute
from edge_dit.store.files import write_atomic, write_json

SEEDS = [1, 2, 3, 4]
PROMPTS = 4
"""Prompts of a contact sheet."""


def samples_folder() -> Path:
    """The samples that lie beside the package in a checkout.

    Raises:
        BadInput: edge-dit was installed without them.
    """
    folder = Path(__file__).resolve().parents[2] / "samples"
    if not (folder / "sana.toml").is_file():
        raise BadInput(
            "quickstart",
            found="the samples are not here",
            expected="an editable install from a checkout of the repository",
            remedy='clone the repository, then: pip install -e ".[all]"; or pass --job YOUR.toml',
        )
    return folder


def quickstart(job_path: Path, out: Path, target: str | None, say: Callable[[Any], None]) -> Path:
    """Run the whole road into ``out``; the path of the loss table.

    A quickstart of the same job that was stopped goes on where it was.

    Args:
        job_path: a job file; held-out images are looked for in ``heldout`` beside its images
            folder, else the loss table is over the training images.
        out: folder for plan, bank, bundle, runs, adapters, pictures and loss table.
        target: train this target only; default: all of the job's, one after the other.
        say: prints a line or a table to the user.

    Raises:
        BadInput: see the stages.
        CheckFailed: a target does not compute what PyTorch computes.
    """
    started = time.monotonic()
    job = read_job(job_path)
    plan = plan_job(job).plan
    targets = [target] if target else plan.targets
    images = read_folder(job.data.images, job.data.prompt, plan.s_max)
    beside = job.data.images.parent / "heldout"
    unseen = read_folder(beside, job.data.prompt, plan.s_max) if beside.is_dir() else images
    write_plan(plan, out / "plan.json")
    for line in plan_in_words(plan):
        say(line)

    precompute(plan, images, out / "bank")
    export_and_verify(plan, targets, out, say)
    adapters = {name: train_target(plan, name, out) for name in targets}
    pipeline = load_pipeline(plan.model)
    adapters["full LoRA"] = out / "adapter-full-lora"
    model = model_of(plan, check=False)  # precompute has checked it
    encoded = encode_whole(plan, model, pipeline, images)
    tensors = train_full_lora(plan, model, pipeline, encoded, plan.steps)
    write_lora(plan, tensors, adapters["full LoRA"])

    sheets = {"before": "before.png", targets[0]: "after.png", "full LoRA": "full-lora.png"}
    losses = compare(plan, pipeline, {"before": None, **adapters}, unseen, sheets, out)
    measured = "held-out loss" if beside.is_dir() else "loss on the training images"
    table = loss_table(losses, plan.steps, measured)
    write_atomic(out / "losses.md", table)
    write_json(out / "losses.json", losses)
    say(table)
    say(f"done in {time.monotonic() - started:.0f} s: look at {out / 'before.png'} and after.png")
    return out / "losses.md"


def export_and_verify(
    plan: Plan, targets: list[str], out: Path, say: Callable[[Any], None]
) -> None:
    """Make ``out/bundle`` unless it is there, and certify it."""
    from edge_dit.app.verify import table, verify, why_failed
    from edge_dit_export.export import export

    if not is_bundle_of(plan, out / "bundle", targets):
        export(plan, out / "bundle", targets)
    certificate = verify(out / "bundle", out / "bank")
    say(table(certificate))
    if not certificate.passed:
        raise CheckFailed(why_failed(certificate))


def train_target(plan: Plan, target: str, out: Path) -> Path:
    """Train one target, or finish its run; the folder of its LoRA."""
    from edge_dit_runtime.run_folder import RunFolder
    from edge_dit_runtime.train import train

    run, folder = out / f"run-{target}", out / f"adapter-{target}"
    train(
        out / "bundle",
        out / "bank",
        run,
        target=target,
        resume=(run / "run.json").is_file(),
    )
    tensors, state = RunFolder(run).adapter()
    if state.done < state.steps:
        raise KeyboardInterrupt  # train stops at the first Ctrl-C; so does the rest of the road
    write_lora(plan, tensors, folder)
    return folder


def write_lora(plan: Plan, tensors: dict[str, Any], folder: Path) -> None:
    """Write an adapter of the plan's model as a user would want it."""
    write_adapter_folder(
        folder,
        tensors,
        plan.rank,
        plan.alpha,
        base_model=str(plan.model),
        peft_only=plan.family in PEFT_ONLY,
    )


def compare(
    plan: Plan,
    pipeline: Any,
    arms: dict[str, Path | None],
    unseen: list[Captioned],
    sheets: dict[str, str],
    out: Path,
) -> dict[str, float]:
    """Held-out loss of every arm, and a contact sheet of some.

    Args:
        plan: of the job.
        pipeline: the base model.
        arms: folder of each arm's LoRA; None is the base model.
        unseen: held-out images; their captions are the prompts of the sheets.
        sheets: file name of the sheet of an arm.
        out: where the sheets go.
    """
    prompts = list(dict.fromkeys(image.caption for image in unseen))[:PROMPTS]
    model = model_of(plan, check=False)
    encoded = encode_whole(plan, model, pipeline, unseen)
    losses = {}
    for name, folder in arms.items():
        with adapted(pipeline, folder):
            losses[name] = heldout_loss(model, pipeline, encoded)
            if name in sheets:
                picture = contact_sheet(model.family, pipeline, prompts, SEEDS, plan.s_max, name)
                picture.save(out / sheets[name])
    return losses


def is_bundle_of(plan: Plan, folder: Path, targets: list[str]) -> bool:
    """Whether ``folder`` holds the bundle of exactly this plan, with these targets."""
    try:
        manifest = open_bundle(folder).manifest
    except BadInput:
        return False
    return manifest.plan == plan.model_dump(mode="json") and list(manifest.targets) == targets


def loss_table(rows: dict[str, float], steps: int, measured: str) -> str:
    """Losses as Markdown, headed ``measured``; the share of full LoRA's improvement of each arm."""
    base, best = rows["before"], rows["full LoRA"]
    lines = [
        f"| adapter, {steps} steps | {measured} | of full LoRA's improvement |",
        "|---|---|---|",
    ]
    for name, loss in rows.items():
        share = (base - loss) / (base - best) if base != best else float("nan")
        lines.append(f"| {name} | {loss:.4f} | {share:.0%} |")
    return "\n".join(lines) + "\n"
