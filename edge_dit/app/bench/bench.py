"""Measure speed and memory of every target against torch eager, on a model of random weights.

Each number comes from a fresh process (`edge_dit.app.bench.child`), and ratios compare processes of
one run. This process samples their memory from outside, anonymous memory and pages of files apart,
because the system can drop pages of files when memory is short.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from edge_dit.app.bench.child import (
    TASK,
    EagerTask,
    ExportTask,
    FullLoraTask,
    ReferenceTask,
    SessionTask,
    Task,
    exact_gradients_file,
    largest_error,
    plan_file,
)
from edge_dit.app.bench.machine import Machine, busy_warning, this_machine
from edge_dit.app.bench.model import Case, random_model
from edge_dit.contract.targets import RECOMPUTE, VARIANTS, TargetVariant
from edge_dit.errors import BadInput, CheckFailed
from edge_dit.store.files import write_json
from edge_dit.text import columns

SAMPLE_SECONDS = 0.03
"""Pause between two samples of a process's memory."""
DEFAULT_VARIANTS = tuple(variant for variant in VARIANTS if variant.dtype != "float16")
"""What is measured when nothing is named."""


@dataclass(frozen=True)
class Row:
    """What one variant of a target takes, beside the baselines of the same run.

    A time is the median of the timed steps, in milliseconds. Memory is a peak, in MB of 10^6 bytes.
    Baselines are torch eager: on the same blocks, and, if it was measured, as full LoRA (every
    block, at full resolution).

    Attributes:
        target: "onnx", "ort-training" or "executorch".
        layout: of the target.
        dtype: how frozen weights are stored.
        trained_blocks: number of trained blocks.
        step_ms: a training step.
        eager_ms: a step of eager on the same blocks, frozen weights rounded to ``dtype``.
        ratio_to_eager: ``step_ms`` over ``eager_ms``.
        full_lora_ms: a step of full LoRA.
        ratio_to_full_lora: ``step_ms`` over ``full_lora_ms``.
        rss_anon_mb: anonymous memory in training.
        rss_file_mb: pages of files in training.
        eager_rss_mb: memory of eager on the same blocks, of both kinds.
        full_lora_rss_mb: memory of full LoRA, of both kinds.
        artifact_bytes: files of the target in the bundle.
        export_s: seconds of the export; layouts that lie in one bundle share it.
        export_rss_mb: memory of the export, of both kinds.
        max_grad_rel_error: largest error of a gradient over its largest value, against gradients
            in float64.
        eager_grad_rel_error: the same of eager's own gradients in float32.
    """

    target: str
    layout: str
    dtype: str
    trained_blocks: int
    step_ms: float
    eager_ms: float
    ratio_to_eager: float
    full_lora_ms: float | None
    ratio_to_full_lora: float | None
    rss_anon_mb: float
    rss_file_mb: float
    eager_rss_mb: float
    full_lora_rss_mb: float | None
    artifact_bytes: int
    export_s: float
    export_rss_mb: float
    max_grad_rel_error: float
    eager_grad_rel_error: float


@dataclass(frozen=True)
class Report:
    """One run of the bench; ``dataclasses.asdict`` of it is what ``edge-dit bench -o`` writes.

    Attributes:
        case: what was measured.
        machine: where and when.
        rows: one for each variant.
    """

    case: Case
    machine: Machine
    rows: list[Row]


@dataclass(frozen=True)
class Process:
    """A child process that ended well.

    Attributes:
        numbers: what it printed, see the tasks of `edge_dit.app.bench.child`.
        anon_mb: peak of its anonymous memory, MB.
        file_mb: peak of its pages of files, MB.
    """

    numbers: dict[str, float]
    anon_mb: float
    file_mb: float

    @property
    def rss_mb(self) -> float:
        """Memory of both kinds, MB."""
        return self.anon_mb + self.file_mb


@dataclass(frozen=True)
class Baselines:
    """Torch eager in this run. A further baseline is a task of its own and an attribute here.

    Attributes:
        eager: dtype of frozen weights -> the same blocks.
        gradient_errors: dtype of frozen weights -> error of eager's gradients, see `Row`.
        full_lora: every block at full resolution; None if not asked for.
    """

    eager: dict[str, Process]
    gradient_errors: dict[str, float]
    full_lora: Process | None


def bench(
    case: Case, variants: Sequence[TargetVariant], work: Path, say: Callable[[str], None]
) -> Report:
    """Measure ``variants`` and the baselines.

    Args:
        case: what to measure.
        variants: targets with their layouts and dtypes.
        work: folder for the random model, the bundles and the exact gradients. A later run of the
            same case uses them again; times and memory of training are always measured anew.
        say: prints a line of progress.

    Raises:
        BadInput: sizes that do not fit the configuration, or something is not installed.
        CheckFailed: a process failed.
    """
    machine = this_machine()
    warning = busy_warning(machine)
    if warning:
        say(warning)
    write_json(plan_file(work), random_model(case, work).model_dump(mode="json"))
    baselines = _baselines(case, {variant.dtype for variant in variants}, work, say)
    rows = [_row(case, variant, baselines, work, say) for variant in variants]
    return Report(case, machine, rows)


def _baselines(case: Case, dtypes: set[str], work: Path, say: Callable[[str], None]) -> Baselines:
    """Measure torch eager, once for each way to store frozen weights."""
    say("eager, the same sub-graph")
    errors, eager = {}, {}
    for dtype in sorted(dtypes):
        exact = _run_once(ReferenceTask(work, dtype), work / f"reference-{dtype}.json")
        errors[dtype] = exact.numbers["error"]
        eager[dtype] = run_task(EagerTask(work, dtype, case.steps))
    if case.full_lora:
        say("eager, full LoRA at full resolution")
    return Baselines(eager, errors, run_task(FullLoraTask(case)) if case.full_lora else None)


def _row(
    case: Case,
    variant: TargetVariant,
    baselines: Baselines,
    work: Path,
    say: Callable[[str], None],
) -> Row:
    """Export one variant, or take its bundle of an earlier run, and measure it."""
    say(f"export {variant}")
    extra_layout = f"-{RECOMPUTE}" if variant.layout == RECOMPUTE else ""
    bundle = work / f"bundle-{variant.target}-{variant.dtype}{extra_layout}"
    exported = _run_once(ExportTask(work, variant, bundle), bundle / "export.json")
    say(f"train {variant}")
    gradients = work / f"gradients-{variant.target}-{variant.layout}-{variant.dtype}.safetensors"
    trained = run_task(SessionTask(work, variant, bundle, case.steps, gradients))
    exact = load_file(exact_gradients_file(work, variant.dtype))
    eager, full = baselines.eager[variant.dtype], baselines.full_lora
    step_ms = trained.numbers["step_ms"]
    return Row(
        **asdict(variant),
        trained_blocks=sum(case.trained),
        step_ms=step_ms,
        eager_ms=eager.numbers["step_ms"],
        ratio_to_eager=step_ms / eager.numbers["step_ms"],
        full_lora_ms=full.numbers["step_ms"] if full else None,
        ratio_to_full_lora=step_ms / full.numbers["step_ms"] if full else None,
        rss_anon_mb=trained.anon_mb,
        rss_file_mb=trained.file_mb,
        eager_rss_mb=eager.rss_mb,
        full_lora_rss_mb=full.rss_mb if full else None,
        artifact_bytes=bytes_in(bundle / variant.target),
        export_s=exported.numbers["seconds"],
        export_rss_mb=exported.rss_mb,
        max_grad_rel_error=largest_error(exact, load_file(gradients)),
        eager_grad_rel_error=baselines.gradient_errors[variant.dtype],
    )


def bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# ---------------------------------------------------------------- for people

METRICS = {
    "step_ms": "step, ms",
    "eager_ms": "eager step, ms",
    "ratio_to_eager": "of eager",
    "ratio_to_full_lora": "of full LoRA",
    "rss_anon_mb": "anonymous, MB",
    "rss_file_mb": "of files, MB",
    "eager_rss_mb": "eager, MB",
    "full_lora_rss_mb": "full LoRA, MB",
    "artifact_bytes": "bundle, bytes",
    "export_s": "export, s",
    "export_rss_mb": "export, MB",
    "max_grad_rel_error": "gradient error",
    "eager_grad_rel_error": "eager, gradient error",
}
"""Attributes of `Row` in the table, and what they are called there."""


def in_words(rows: Sequence[Row]) -> list[str]:
    """Lines of a table with a column for each row: a variant's numbers stand below each other."""
    headings = [str(TargetVariant(row.target, row.layout, row.dtype)) for row in rows]
    return columns(
        headings,
        [(name, [_cell(key, getattr(row, key)) for row in rows]) for key, name in METRICS.items()],
    )


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key.endswith("grad_rel_error"):
        return f"{value:.1e}"
    return f"{value:.3f}" if key.startswith("ratio") else f"{value:,.0f}"


# ---------------------------------------------------------------- processes


def _run_once(task: Task, record: Path) -> Process:
    """`run_task`, or what an earlier run of the same task left in ``record``."""
    if not record.is_file():
        write_json(record, asdict(run_task(task)))
    return Process(**json.loads(record.read_text()))


def run_task(task: Task) -> Process:
    """Run a task in a process of its own.

    Raises:
        BadInput: the process cannot work with its input, or lacks a package.
        CheckFailed: it failed in another way.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "edge_dit.app.bench.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    peaks = {"RssAnon": 0.0, "RssFile": 0.0}
    watcher = threading.Thread(target=_watch, args=(child, peaks))
    watcher.start()
    output, errors = child.communicate(TASK.dump_json(task).decode())
    watcher.join()
    reason = (errors.strip().splitlines() or ["no message"])[-1]
    if child.returncode == 2:
        raise BadInput(f"bench {task.kind}", found=reason)
    if child.returncode != 0:
        raise CheckFailed(f"bench {task.kind}: ended with code {child.returncode}: {reason}")
    numbers = json.loads(output.strip().splitlines()[-1])
    return Process(numbers, anon_mb=peaks["RssAnon"], file_mb=peaks["RssFile"])


def _watch(child: subprocess.Popen[Any], peaks: dict[str, float]) -> None:
    """Raise ``peaks``, MB by the kernel's name, to what the process holds until it ends."""
    status = Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            return
        for line in lines:
            name, _, rest = line.partition(":")
            if name in peaks:  # the kernel says "kB" and means KiB
                peaks[name] = max(peaks[name], int(rest.split()[0]) * 1024 / 1e6)
        time.sleep(SAMPLE_SECONDS)
