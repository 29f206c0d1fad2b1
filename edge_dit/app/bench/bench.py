"""Measure speed and memory of every target against torch eager, on a model of random weights.

Each number comes from a fresh process (`edge_dit.app.bench.child`), and ratios compare processes of
one run. This process samples their memory from outside, anonymous memory and pages of files apart,
because the system can drop pages of files when memory is short.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from edge_dit.app.bench.child import (
    TASK,
    ExportTask,
    FullLoraTask,
    ProfileTask,
    ReferenceTask,
    SessionTask,
    Task,
    TorchTask,
    exact_gradients_file,
    largest_error,
    plan_file,
)
from edge_dit.app.bench.limit import drop_pages, limited
from edge_dit.app.bench.machine import Machine, busy_warning, this_machine
from edge_dit.app.bench.model import Case, random_model
from edge_dit.contract.targets import INT8, INT8_VARIANTS, RECOMPUTE, VARIANTS, WIDE, TargetVariant
from edge_dit.errors import BadInput, CheckFailed
from edge_dit.store.files import write_json
from edge_dit.text import columns

SAMPLE_SECONDS = 0.03
"""Pause between two samples of a process's memory."""
DEFAULT_VARIANTS = (
    *(v for v in VARIANTS if v.dtype in (WIDE, INT8)),
    *(v for v in INT8_VARIANTS if v.compute == INT8),
)
"""What is measured when nothing is named."""


EAGER, FULL = "eager", "full-lora"
BASELINES: dict[str, dict[str, Any]] = {
    EAGER: {},
    "eager-bf16": {"bf16": True},
    "compile": {"compiled": True},
    "compile-bf16": {"bf16": True, "compiled": True},
    FULL: {},
    "full-lora-bf16": {"bf16": True},
}
"""What a user could run instead, by name: options of `TorchTask`, or of `FullLoraTask`."""
PROFILED_STEPS = 3


@dataclass(frozen=True)
class Baseline:
    """Torch in this run.

    Attributes:
        name: one of `BASELINES`.
        step_ms: median of the timed steps, milliseconds; None if it cannot run here.
        rss_anon_mb, rss_file_mb: peaks of its memory, MB of 10^6 bytes.
        grad_rel_error: largest error of a gradient over its largest value, against gradients in
            float64; None of full LoRA.
        note: why it cannot run here.
    """

    name: str
    step_ms: float | None
    rss_anon_mb: float | None
    rss_file_mb: float | None
    grad_rel_error: float | None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """What one variant of a target takes, beside the baselines of the same run.

    A time is the median of the timed steps, in milliseconds. Memory is a peak, in MB of 10^6 bytes.
    What it is compared with is measured in float32 weights: torch eager and the fastest of the
    `Baseline` on the same blocks, and full LoRA (every block, at full resolution).

    Attributes:
        target: "onnx", "ort-training" or "executorch".
        layout: of the target.
        dtype: how frozen weights are stored.
        compute: how products with them are computed.
        trained_blocks: number of trained blocks.
        step_ms: a training step.
        eager_ms: a step of eager.
        ratio_to_eager: ``step_ms`` over ``eager_ms``.
        ratio_to_fastest_torch: ``step_ms`` over the fastest of torch on the same blocks.
        full_lora_ms: a step of the fastest full LoRA.
        ratio_to_full_lora: ``step_ms`` over ``full_lora_ms``.
        rss_anon_mb: anonymous memory in training.
        rss_file_mb: pages of files in training.
        artifact_bytes: files of the target in the bundle.
        export_s: seconds of the export; layouts that lie in one bundle share it.
        export_rss_mb: memory of the export, of both kinds.
        max_grad_rel_error: largest error of a gradient over its largest value, against gradients
            in float64 with the weights as they are stored.
        eager_grad_rel_error: the same of eager's own gradients in float32.
        read_mb: MB that a step reads from storage.
        memory_mb: the limit that it trained in; None for none. See `edge_dit.app.bench.limit`.
    """

    target: str
    layout: str
    dtype: str
    compute: str
    trained_blocks: int
    step_ms: float
    eager_ms: float
    ratio_to_eager: float
    ratio_to_fastest_torch: float
    full_lora_ms: float | None
    ratio_to_full_lora: float | None
    rss_anon_mb: float
    rss_file_mb: float
    artifact_bytes: int
    export_s: float
    export_rss_mb: float
    max_grad_rel_error: float
    eager_grad_rel_error: float
    read_mb: float
    memory_mb: float | None = None


@dataclass(frozen=True)
class Report:
    """One run of the bench; ``dataclasses.asdict`` of it is what ``edge-dit bench -o`` writes.

    Attributes:
        case: what was measured.
        machine: where and when.
        baselines: torch, in the same run.
        rows: one for each variant.
        operators: by variant, calls and milliseconds of its operators in a step; where asked for.
    """

    case: Case
    machine: Machine
    baselines: list[Baseline]
    rows: list[Row]
    operators: dict[str, dict[str, float]] = field(default_factory=dict)


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
class Asked:
    """What to measure.

    Attributes:
        variants: targets with their layouts, dtypes and how they compute.
        baselines: some of `BASELINES`; eager is measured in any case. None for all of them; without
            those of full LoRA where the case leaves it out.
        profile: whether to time operators too.
        memory: bytes that a training process may take; default as many as there are.
    """

    variants: Sequence[TargetVariant]
    baselines: Sequence[str] | None = None
    profile: bool = False
    memory: int | None = None


def bench(case: Case, asked: Asked, work: Path, say: Callable[[str], None]) -> Report:
    """Measure variants and baselines.

    Args:
        case: the sizes.
        asked: what to measure.
        work: folder for the random model, the bundles and the exact gradients. A later run of the
            same case uses them again; times and memory of training are always measured anew.
        say: prints a line of progress.

    Raises:
        BadInput: sizes that do not fit the configuration, an unknown baseline or one of full LoRA
            that the case leaves out, or something is not installed.
        CheckFailed: a process failed.
    """
    wanted = _wanted(case, asked.baselines)
    machine = this_machine()
    warning = busy_warning(machine)
    if warning:
        say(warning)
    write_json(plan_file(work), random_model(case, work).model_dump(mode="json"))
    errors = {}
    for dtype in sorted({WIDE, *(variant.stored for variant in asked.variants)}):
        exact = _run_once(ReferenceTask(work, dtype), work / f"reference-{dtype}.json")
        errors[dtype] = exact.numbers["error"]
    baselines = [_baseline(name, case, work, say) for name in wanted]
    eager = next(b.step_ms for b in baselines if b.name == EAGER)
    assert eager is not None
    torch = [b.step_ms for b in baselines if b.step_ms and not b.name.startswith(FULL)]
    full = [b.step_ms for b in baselines if b.step_ms and b.name.startswith(FULL)]
    report = Report(case, machine, baselines, [])
    for variant in asked.variants:
        times = eager, min(torch), min(full, default=None)
        try:
            report.rows.append(
                _row(case, variant, errors[variant.stored], times, work, say, asked.memory)
            )
        except (BadInput, CheckFailed) as error:
            if asked.memory is None:
                raise
            say(f"{variant}: {error}")
        if asked.profile and variant.target != "onnx":
            say(f"profile {variant}: left out, only onnx has operators to time")
        elif asked.profile:
            say(f"profile {variant}")
            task = ProfileTask(work, variant, _bundle(work, variant), PROFILED_STEPS)
            report.operators[str(variant)] = run_task(task).numbers
    return report


def _wanted(case: Case, named: Sequence[str] | None) -> list[str]:
    """Names of the baselines to measure, in the order of `BASELINES`; see `Asked`."""
    left_out = [] if case.full_lora else [name for name in BASELINES if name.startswith(FULL)]
    possible = [name for name in BASELINES if name not in left_out]
    if named is None:
        return possible
    for name in named:
        beside = " beside --no-full-lora" if name in left_out else ""
        if name not in possible:
            raise BadInput("--baseline", found=name + beside, expected=", ".join(possible))
    return [name for name in possible if name == EAGER or name in named]


def _baseline(name: str, case: Case, work: Path, say: Callable[[str], None]) -> Baseline:
    """Measure one of `BASELINES`; one that cannot run here says why, and the rest goes on.

    Raises:
        CheckFailed: eager cannot run here; every row is compared with it.
    """
    say(f"torch: {name}")
    options = BASELINES[name]
    task: Task = TorchTask(work, case.steps, **options)
    if name.startswith(FULL):
        task = FullLoraTask(case, **options)
    try:
        done = run_task(task)
    except CheckFailed as error:
        if name == EAGER:
            raise
        say(f"torch: {name}: {error}")
        return Baseline(name, None, None, None, None, str(error))
    numbers = done.numbers
    return Baseline(name, numbers["step_ms"], done.anon_mb, done.file_mb, numbers.get("error"))


def _bundle(work: Path, variant: TargetVariant) -> Path:
    extra_layout = f"-{RECOMPUTE}" if variant.layout == RECOMPUTE else ""
    return work / f"bundle-{variant.target}-{variant.dtype}-{variant.compute}{extra_layout}"


def _row(
    case: Case,
    variant: TargetVariant,
    error: float,
    times: tuple[float, float, float | None],
    work: Path,
    say: Callable[[str], None],
    memory: int | None,
) -> Row:
    """Export one variant, or take its bundle of an earlier run, and measure it.

    Args:
        case: the sizes.
        variant: to measure.
        error: of eager's own gradients.
        times: milliseconds of eager, of the fastest torch on the same blocks, of full LoRA.
        work: folder of the bench.
        say: prints a line of progress.
        memory: bytes that it may take to train.
    """
    say(f"export {variant}")
    bundle = _bundle(work, variant)
    exported = _run_once(ExportTask(work, variant, bundle), bundle / "export.json")
    say(f"train {variant}")
    gradients = work / f"gradients-{str(variant).replace(':', '-')}.safetensors"
    task = SessionTask(work, variant, bundle, case.steps, gradients)
    if memory is None:
        trained = run_task(task)
    else:
        with limited(memory) as within:
            say(drop_pages(path for path in bundle.rglob("*") if path.is_file()))
            trained = run_task(task, within)
    exact = load_file(exact_gradients_file(work, variant.stored))
    step_ms, (eager, fastest, full) = trained.numbers["step_ms"], times
    return Row(
        **asdict(variant),
        trained_blocks=sum(case.trained),
        step_ms=step_ms,
        eager_ms=eager,
        ratio_to_eager=step_ms / eager,
        ratio_to_fastest_torch=step_ms / fastest,
        full_lora_ms=full,
        ratio_to_full_lora=step_ms / full if full else None,
        rss_anon_mb=trained.anon_mb,
        rss_file_mb=trained.file_mb,
        artifact_bytes=bytes_in(bundle / variant.target),
        export_s=exported.numbers["seconds"],
        export_rss_mb=exported.rss_mb,
        max_grad_rel_error=largest_error(exact, load_file(gradients)),
        eager_grad_rel_error=error,
        read_mb=trained.numbers["read_mb"],
        memory_mb=memory and memory / 1e6,
    )


def bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# ---------------------------------------------------------------- for people

METRICS = {
    "step_ms": "step, ms",
    "eager_ms": "eager step, ms",
    "ratio_to_eager": "of eager",
    "ratio_to_fastest_torch": "of the fastest torch",
    "ratio_to_full_lora": "of full LoRA",
    "rss_anon_mb": "anonymous, MB",
    "rss_file_mb": "of files, MB",
    "read_mb": "read a step, MB",
    "artifact_bytes": "bundle, bytes",
    "export_s": "export, s",
    "export_rss_mb": "export, MB",
    "max_grad_rel_error": "gradient error",
    "eager_grad_rel_error": "eager, gradient error",
}
"""Attributes of `Row` in the table, and what they are called there."""


def in_words(report: Report) -> list[str]:
    """Lines for people: a column for each row, the baselines, and where there are any the operators
    that take most time.
    """
    rows = report.rows
    headings = [str(TargetVariant(row.target, row.layout, row.dtype, row.compute)) for row in rows]
    cells = [
        (name, [_cell(key, getattr(row, key)) for row in rows]) for key, name in METRICS.items()
    ]
    lines = columns(headings, cells) if rows else []
    lines += [f"torch, {baseline.name}: {_of_torch(baseline)}" for baseline in report.baselines]
    for variant, numbers in report.operators.items():
        lines += [f"operators of {variant}:", *_of_operators(numbers)]
    return lines


def _of_torch(baseline: Baseline) -> str:
    if baseline.step_ms is None:
        return baseline.note
    memory = f"{baseline.rss_anon_mb:,.0f} MB anonymous, {baseline.rss_file_mb:,.0f} MB of files"
    error = baseline.grad_rel_error
    off = f", gradient error {error:.1e}" if error is not None else ""
    return f"{baseline.step_ms:,.0f} ms, {memory}{off}"


def _of_operators(numbers: Mapping[str, float], most: int = 12) -> list[str]:
    times = {key[: -len(".ms")]: ms for key, ms in numbers.items() if key.endswith(".ms")}
    largest = sorted(times, key=lambda name: -times[name])[:most]
    total = sum(times.values())
    calls = {name: numbers[f"{name}.calls"] for name in largest}
    return [
        f"  {name}: {times[name]:.1f} ms, {times[name] / total:.0%}, {calls[name]:.0f} calls"
        for name in largest
    ]


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


def run_task(task: Task, within: Sequence[str] = ()) -> Process:
    """Run a task in a process of its own.

    Args:
        task: to run.
        within: what its command line is put behind, see `limited`.

    Raises:
        BadInput: the process cannot work with its input, or lacks a package.
        CheckFailed: it failed in another way.
    """
    child = subprocess.Popen(
        [*within, sys.executable, "-m", "edge_dit.app.bench.child"],
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
    if child.returncode == -signal.SIGKILL and within:
        raise CheckFailed(f"bench {task.kind}: killed, it needs more memory than it may take")
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
