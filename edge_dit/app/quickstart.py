"""All stages of `edge_dit.app.run` on a shipped sample, with pictures before and after."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from edge_dit.app.run import (
    Road,
    Say,
    begin,
    export,
    exported_as,
    fill_bank,
    on_device,
    train,
    verify,
)
from edge_dit.contract.adapter import write_adapter_folder
from edge_dit.contract.adapter_formats import format_of
from edge_dit.contract.bundle import open_bundle
from edge_dit.contract.targets import OnnxFacts
from edge_dit.errors import BadInput
from edge_dit.models.model import Model
from edge_dit.models.pipeline import load_pipeline
from edge_dit.pictures.dataset import Captioned, read_folders
from edge_dit.pictures.images import write_picture
from edge_dit.planning.plan import LOOP_TARGET, model_of
from edge_dit.progress import warn
from edge_dit.store.files import write_atomic, write_json

SEEDS = [1, 2, 3, 4]
PROMPTS = 4
"""Most prompts on a contact sheet."""
HELD_OUT = "heldout"
"""Name of the folder of held-out pictures, next to the folder of a job's pictures."""
BEFORE, FULL_LORA = "before", "full LoRA"


def samples_folder() -> Path:
    """The folder of samples in a checkout.

    Raises:
        BadInput: edge-dit was installed without them.
    """
    above = Path(__file__).resolve().parents
    folder = next((p / "samples" for p in above if (p / "pyproject.toml").is_file()), None)
    if folder is None or not (folder / "sana.toml").is_file():
        raise BadInput(
            "quickstart",
            found="the samples are not here",
            expected="an editable install from a checkout of the repository",
            remedy='clone the repository, then: pip install -e ".[all]"; or pass --job YOUR.toml',
        )
    return folder


@dataclass(frozen=True)
class Judged:
    """What adapters are compared with.

    Attributes:
        model: the job's model.
        pipeline: its whole pipeline.
        pictures: the held-out pictures, or else the job's own. Losses are measured on them, and
            pictures are generated from their captions.
        measured: name of that loss, for the table.
    """

    model: Model
    pipeline: Any
    pictures: list[Captioned]
    measured: str


def quickstart(
    job_path: Path, out: Path, target: str | None, say: Say, compare: bool = False
) -> dict[str, Any]:
    """Run all stages into ``out`` and draw pictures before and after; what was measured.

    A quickstart of the same job that was stopped is continued.

    Args:
        job_path: a job file. Losses are measured on the pictures in ``heldout``, next to the job's
            pictures, or else on the job's pictures.
        out: folder for everything.
        target: the one to train; default the job's first, with ``compare`` all of the job's.
        say: prints to the user.
        compare: also train the job's other targets, and LoRA on all blocks at full resolution in
            PyTorch: what users do today.

    Raises:
        BadInput: a stage refuses its input.
        CheckFailed: a target does not compute what PyTorch computes.
    """
    started = time.monotonic()
    road = begin(job_path, out, None, say, [target] if target else [])
    targets = [target] if target else road.plan.targets if compare else road.plan.targets[:1]
    for name in targets:
        exported_as(road.plan, name)
    for name in targets:
        export(road, name)
    fill_bank(road, targets, say)
    for name in targets:
        verify(road, name, say)
    arms: dict[str, Path | None] = {BEFORE: None}
    arms |= {name: train(road, name, say) for name in targets}
    judged = _judged(road)
    if compare:
        arms[FULL_LORA] = _full_lora(road, judged)
    sheets = {BEFORE: "before.png", targets[0]: "after.png", FULL_LORA: "full-lora.png"}
    if road.looped(targets[0]):
        for name, run in {BEFORE: None, targets[0]: road.run(targets[0])}.items():
            paint(road, targets[0], run, sheets.pop(name), say)
    losses = judge(road, judged, arms, sheets)
    words = loss_table(losses, road.plan.steps, judged.measured)
    facts = {
        "losses": losses,
        "measured": judged.measured,
        "steps": road.plan.steps,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_atomic(out / "losses.md", words)
    write_json(out / "losses.json", facts)
    say(words)
    say(f"done in {facts['seconds']:.0f} s: look at {out / 'before.png'} and after.png")
    return facts


def paint(road: Road, target: str, run: Path | None, sheet: str, say: Say) -> None:
    """Let the device paint the bundle's preview prompts on a contact sheet.

    Args:
        road: the job's folder.
        target: whose bundle has the loop's parts.
        run: whose adapter is used; None for the base model.
        sheet: file of the contact sheet.
        say: prints to the user.
    """
    bundle = road.bundle(target)
    facts = cast(OnnxFacts, open_bundle(bundle).facts(LOOP_TARGET)).loop
    assert facts is not None
    prompts = [facts.prompts[number] for number in facts.previews[:PROMPTS]]
    options = ["--run", str(run)] if run else []
    options += [part for seed in SEEDS for part in ("--seed", str(seed))]
    options += ["--title", BEFORE if run is None else target]
    on_device(say, "paint", str(bundle), *options, "-o", str(road.out / sheet), "--", *prompts)


def _judged(road: Road) -> Judged:
    beside = road.job.data.images.parent / HELD_OUT
    pictures = [picture for picture in road.pictures if not picture.prior]
    measured = "loss on the training pictures"
    if beside.is_dir():
        heldout = replace(road.job.data.folders()[0], images=beside)
        pictures = read_folders([heldout], road.plan.s_max, warn)
        measured = "held-out loss"
    model = model_of(road.plan)
    return Judged(model, load_pipeline(model.folder, variant=model.variant), pictures, measured)


def _full_lora(road: Road, judged: Judged) -> Path:
    """Train LoRA on all blocks in PyTorch, unless that is done already; the adapter's folder."""
    from edge_dit.reference.evaluate import encode_whole
    from edge_dit.reference.full_lora import train_full_lora

    plan, folder = road.plan, road.out / "lora-full"
    if not folder.is_dir():
        encoded = encode_whole(plan, judged.model, judged.pipeline, road.pictures)
        tensors = train_full_lora(plan, judged.model, judged.pipeline, encoded, plan.steps)
        base, form = plan.model_name, format_of(plan.family)
        write_adapter_folder(folder, tensors, plan.rank, plan.alpha, base, form)
    return folder


def judge(
    road: Road, judged: Judged, arms: dict[str, Path | None], sheets: dict[str, str]
) -> dict[str, float]:
    """Loss of every adapter; contact sheets of some are written.

    Args:
        road: the job's folder.
        judged: what the adapters are compared with.
        arms: name -> folder of the LoRA, or None for the base model.
        sheets: name -> file of the contact sheet.
    """
    from edge_dit.reference.contact_sheet import contact_sheet
    from edge_dit.reference.evaluate import adapted, encode_whole, heldout_loss

    plan, model, pipeline = road.plan, judged.model, judged.pipeline
    prompts = list(dict.fromkeys(picture.caption for picture in judged.pictures))[:PROMPTS]
    encoded = encode_whole(plan, model, pipeline, judged.pictures)
    losses = {}
    for name, folder in arms.items():
        with adapted(pipeline, folder):
            losses[name] = heldout_loss(model, pipeline, encoded)
            if name in sheets:
                picture = contact_sheet(model.family, pipeline, prompts, SEEDS, plan.s_max, name)
                write_picture(road.out / sheets[name], picture)
    return losses


def loss_table(losses: dict[str, float], steps: int, measured: str) -> str:
    """Losses as a Markdown table. If full LoRA is among them, the table also says how much of its
    improvement each adapter has.

    Args:
        losses: by name; `BEFORE` is among them.
        steps: number of training steps.
        measured: name of the loss.
    """
    base, best = losses[BEFORE], losses.get(FULL_LORA)
    headings, rule = f"| adapter, {steps} steps | {measured} |", "|---|---|"
    if best is not None:
        headings, rule = f"{headings} of full LoRA's improvement |", f"{rule}---|"
    lines = [headings, rule]
    for name, loss in losses.items():
        share = ""
        if best is not None:
            part = (base - loss) / (base - best) if base != best else float("nan")
            share = f" {part:.0%} |"
        lines.append(f"| {name} | {loss:.4f} |{share}")
    return "\n".join(lines) + "\n"
