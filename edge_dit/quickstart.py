"""The whole road on the shipped sample, with pictures before and after."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_dit.adapter import read_adapter, write_adapter_folder
from edge_dit.bundle import ADAPTER
from edge_dit.errors import BadInput, CheckFailed
from edge_dit.evaluate import adapted, contact_sheet, encode_whole, heldout_loss, train_full_lora
from edge_dit.files import write_atomic, write_json
from edge_dit.images import read_folder
from edge_dit.job import read_job
from edge_dit.pipeline import load_pipeline
from edge_dit.plan import Plan, make_plan
from edge_dit.precompute import precompute

SEEDS = [1, 2, 3, 4]
PROMPTS = 4
"""Prompts of a contact sheet."""


def samples_folder() -> Path:
    """The samples that lie beside the package in a checkout.

    Raises:
        BadInput: edge-dit was installed without them.
    """
    folder = Path(__file__).resolve().parent.parent / "samples"
    if not (folder / "sana.toml").is_file():
        raise BadInput(
            "quickstart",
            found="the samples are not here",
            expected="an editable install from a checkout of the repository",
            remedy='clone the repository, then: pip install -e ".[all]"; or pass --job YOUR.toml',
        )
    return folder


def quickstart(job_path: Path, out: Path, target: str | None, say: Callable[[str], None]) -> Path:
    """Run the whole road into ``out``; the path of the loss table.

    Every stage goes on where an earlier, stopped quickstart of the same job left it.

    Args:
        job_path: a job file; held-out images are looked for in ``heldout`` beside its images
            folder.
        out: folder for plan, bank, bundle, runs, adapters, pictures and loss table.
        target: train this target only; default: all of the job's, one after the other.
        say: prints a line to the user.
    """
    from edge_dit_export.export import export
    from edge_dit_runtime.train import train
    from edge_dit_runtime.verify import verify

    started = time.monotonic()
    job = read_job(job_path)
    plan = make_plan(job)
    targets = [target] if target else plan.targets
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "plan.json", plan.model_dump_json(indent=2) + "\n")
    say(
        f"plan: train blocks {plan.trained.start}..{plan.trained.stop - 1} of {plan.layers}, "
        f"patches {plan.s_min} px out of {plan.s_min}..{plan.s_max} px"
    )
    images = read_folder(job.data.images, job.data.prompt, plan.s_max)
    heldout_folder = job.data.images.parent / "heldout"
    heldout = (
        read_folder(heldout_folder, job.data.prompt, plan.s_max)
        if heldout_folder.is_dir()
        else images
    )
    precompute(plan, images, out / "bank")
    export(plan, out / "bundle", targets)
    certificate = verify(out / "bundle", out / "bank")
    say(parity_line(certificate))
    if not certificate["passed"]:
        raise CheckFailed("parity failed: see " + str(out / "bundle" / "parity.json"))

    rows: dict[str, float] = {}
    adapters: dict[str, Path] = {}
    for name in targets:
        run = out / f"run-{name}"
        train(out / "bundle", out / "bank", run, name, resume=(run / "run.json").is_file())
        tensors, rank, alpha = read_adapter(run / ADAPTER)
        adapters[name] = out / f"adapter-{name}"
        write_adapter_folder(adapters[name], tensors, rank, alpha, str(plan.model))
    pipeline = load_pipeline(plan.model)
    full = out / "adapter-full-lora"
    whole = encode_whole(plan, pipeline, images)
    tensors = train_full_lora(plan, pipeline, whole, plan.steps)
    write_adapter_folder(full, tensors, plan.rank, plan.alpha, str(plan.model))

    prompts = list(dict.fromkeys(image.caption for image in heldout))[:PROMPTS]
    unseen = encode_whole(plan, pipeline, heldout)
    arms: dict[str, Path | None] = {"before": None, **adapters, "full LoRA": full}
    for name, folder in arms.items():
        with adapted(pipeline, folder):
            rows[name] = heldout_loss(plan, pipeline, unseen)
            if name == "before":
                sheet(plan, pipeline, prompts, "before", out / "before.png")
            elif name == targets[0]:
                sheet(plan, pipeline, prompts, f"after ({name})", out / "after.png")
            elif name == "full LoRA":
                sheet(plan, pipeline, prompts, name, out / "full-lora.png")
    table = loss_table(rows, plan.steps)
    write_atomic(out / "losses.md", table)
    write_json(out / "losses.json", rows)
    say(table)
    say(f"done in {time.monotonic() - started:.0f} s: look at {out / 'before.png'} and after.png")
    return out / "losses.md"


def sheet(plan: Plan, pipeline: Any, prompts: list[str], title: str, path: Path) -> None:
    """Write a contact sheet, the same seeds every time."""
    picture = contact_sheet(plan, pipeline, prompts, SEEDS, title)
    picture.save(path)


def loss_table(rows: dict[str, float], steps: int) -> str:
    """Held-out losses as Markdown; the share of full LoRA's improvement that each arm reached."""
    base, best = rows["before"], rows["full LoRA"]
    lines = [
        f"| adapter, {steps} steps | held-out loss | of full LoRA's improvement |",
        "|---|---|---|",
    ]
    for name, loss in rows.items():
        share = (base - loss) / (base - best) if base != best else float("nan")
        lines.append(f"| {name} | {loss:.4f} | {share:.0%} |")
    return "\n".join(lines) + "\n"


def parity_line(certificate: dict[str, Any]) -> str:
    """One line for each target of a certificate."""
    parts = []
    for target, result in certificate["targets"].items():
        if "error" in result:
            parts.append(f"{target}: FAILED, {result['error']}")
            continue
        worst = {kind: f"{row['relative']:.1e}" for kind, row in result["worst"].items()}
        state = "passed" if result["passed"] else "FAILED"
        parts.append(f"{target}: {state} {json.dumps(worst)}")
    return "\n".join(parts)
