"""Write docs/performance.md from the raw JSON of benchmarks that is in the repository.

python docs/make_performance.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edge_dit.contract.targets import TargetVariant

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
MOST_OPERATORS = 8
"""Operators of a profile that are named."""
DOCUMENT = DOCS / "performance.md"
RESULTS = DOCS / "results"
"""Folder of raw JSON: bench-*.json of `edge-dit bench`, quickstart.json, busy.json."""
(MEASURED,) = ROOT.glob("edge_dit/*/measured.json")

INTRODUCTION = """# Performance

Every table here is rendered from raw JSON in the repository: `python docs/make_performance.py`
writes this document. Below each table stand its raw JSON and the command that measures it again.

How it is measured (`edge_dit/app/bench/bench.py`):

- Random weights of a public checkpoint's shapes, batch 1. Speed and memory do not depend on the
  values of weights.
- Each figure comes from a fresh process. Steps are timed after two that are not; the median counts.
- A *ratio* compares processes of one run on one machine. Milliseconds of two tables do not compare.
- *Anonymous* memory cannot be evicted. *File pages* hold memory-mapped weights; the system can drop
  them and read them again. Both are peaks, sampled from outside.
- *Eager* is torch eager training the same blocks with the same LoRA, in float32. The other rows of
  torch are what a user could run instead: ``torch.autocast`` to bfloat16, ``torch.compile``, both.
  *Full LoRA* is LoRA on all blocks at the checkpoint's full resolution; in bfloat16 with gradient
  checkpointing.
- `onnx:fused:int8:int8` is the target, its layout, how frozen matrices are stored, and how they are
  multiplied.
- *Gradient error* is the largest difference of a LoRA gradient from one computed in float64, over
  that gradient's largest value; the worst tensor counts.
"""
ABLATIONS = """## What is learned

Quality has tables of its own in [samples/reproduce](../samples/reproduce/README.md).
[docs/method.md](method.md#what-holds-here-and-what-does-not) sums them up.

Raw JSON: `samples/reproduce/results/tiny-sana/results.json`,
`samples/reproduce/results/tiny-flux/results.json`. Re-make:
`python samples/reproduce/run.py --work DIR`, and with `--model tiny-flux`
"""


def render(results: Path = RESULTS) -> str:
    """The document's text.

    Args:
        results: folder of the benchmarks' JSON files.
    """
    parts = [INTRODUCTION, "## Step time and memory\n"]
    files = sorted(results.glob("bench-*.json"))
    parts += [_bench(file) for file in files]
    if not files:
        parts.append("No benchmark's raw JSON is in the repository yet.\n")
    parts += [_loop(file) for file in sorted(results.glob("loop-*.json"))]
    more = [(results / "quickstart.json", _quickstart), (results / "busy.json", _busy)]
    parts += [section(file) for file, section in more if file.is_file()]
    return "\n".join([*parts, _predictions(), ABLATIONS])


def _loop(file: Path) -> str:
    """One run of `edge-dit bench --loop`."""
    found = json.loads(file.read_text())
    rows, machine = found["rows"], found["machine"]
    step = next(row["seconds"] for row in rows if row["stage"] == "train")
    of = {
        "collect": "collect, a draw of the bank",
        "train": "train --bank, a step",
        "live": "train --images, a step that encodes a crop",
        "paint": "paint, 20 steps and a picture",
    }
    cells = [
        [
            of[row["stage"]],
            f"{row['seconds']:.1f}",
            f"{row['seconds'] / step:.1f}",
            f"{row['rss_anon_mb']:,.0f}",
            f"{row['rss_file_mb']:,.0f}",
        ]
        for row in rows
    ]
    lines = [
        f"## The loop on the device: {found['config']}, {rows[0]['dtype']}",
        "",
        "The whole model with random weights, half of its blocks trained, stored tail, patches and "
        f"pictures of {found['side']} pixels, its published autoencoder in tiles, streamed. "
        f"{machine['processor']}, {machine['cores']} cores, load average "
        f"{machine['load_average']:.1f} when it began: memory holds, of times only the ratios "
        "roughly.",
        "",
        *_table(["", "s", "of a step", "anonymous, MB", "file pages, MB"], cells),
        "",
        f"Bundle {found['bundle_bytes'] / 1e6:,.0f} MB, exported in {found['export_s']:.0f} s. "
        f"Raw JSON: `docs/results/{file.name}`. Re-make: `edge-dit bench --loop --config "
        f"{found['config']} --target onnx:streamed:{rows[0]['dtype']} -o docs/results/{file.name}`",
        "",
    ]
    return "\n".join(lines)


def _quickstart(file: Path) -> str:
    """One run of `edge-dit quickstart --compare`."""
    found = json.loads(file.read_text())
    losses = found["losses"]
    base, best = losses["before"], losses["full LoRA"]
    cells = [[n, f"{v:.4f}", f"{(base - v) / (base - best):.0%}"] for n, v in losses.items()]
    lines = [
        "## What the quickstart learns",
        "",
        f"`samples/tiny-sana`, {found['steps']} steps, one run. Full LoRA trains all blocks on "
        "whole pictures in PyTorch, as many steps.",
        "",
        *_table(["", found["measured"], "of full LoRA's improvement"], cells),
        "",
        f"Raw JSON: `docs/results/{file.name}`. Re-make: `edge-dit quickstart --compare --out out`",
        "",
    ]
    return "\n".join(lines)


def _busy(file: Path) -> str:
    """One run of tests/benchmarks/busy.py."""
    found = json.loads(file.read_text())
    median = found["median"]
    settings = list(median["precompute"])
    cells = [
        [stage, *(_seconds(by[name], found["longest"]) for name in settings)]
        for stage, by in median.items()
    ]
    lines = [
        "## Beside other work",
        "",
        f"Seconds of `precompute` ({found['size']} draws) and `train` ({found['size']} steps) of "
        f"`samples/sana.toml` beside {found['busy']} processes that compute without end, on two "
        "cores; medians of interleaved runs. ACTIVE is how torch and onnxruntime wait by "
        "themselves: their threads spin.",
        "",
        *_table(["", *settings], cells),
        "",
        f"Raw JSON: `docs/results/{file.name}`. Re-make: "
        f"`python tests/benchmarks/busy.py WORK -o docs/results/{file.name}`",
        "",
    ]
    return "\n".join(lines)


def _seconds(value: float, longest: float) -> str:
    """A time; one that was cut off says so."""
    return f"over {longest:.0f}" if value >= longest else f"{value:.0f}"


def _bench(file: Path) -> str:
    """One run of `edge-dit bench`."""
    found = json.loads(file.read_text())
    case, rows = found["case"], found["rows"]
    trained = "+".join(map(str, case["trained"]))
    facts = dict(found.get("machine", {}))
    facts |= {package: v for package, v in facts.pop("versions", {}).items() if v}
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())
    headings = [
        "",
        "step, ms",
        "of eager",
        "of the fastest torch",
        "of full LoRA",
        "anonymous, MB",
        "file pages, MB",
        "bundle, MB",
        "export, s",
        "gradient error",
    ]
    cells = [
        [
            _name(row),
            f"{row['step_ms']:,.0f}",
            f"{row['ratio_to_eager']:.2f}",
            f"{row['ratio_to_fastest_torch']:.2f}",
            _optional(row["ratio_to_full_lora"], ".2f"),
            f"{row['rss_anon_mb']:,.0f}",
            f"{row['rss_file_mb']:,.0f}",
            f"{row['artifact_bytes'] / 1e6:,.0f}",
            f"{row['export_s']:,.0f}",
            f"{row['max_grad_rel_error']:.1e}",
        ]
        for row in rows
    ]
    lines = [
        f"### {case['config']}, {trained} trained blocks, {case['tokens']} image tokens",
        "",
        f"{case['text']} text tokens, LoRA rank {case['rank']}, {case['steps']} timed steps. "
        f"Machine: {machine or 'not recorded'}.",
        "",
        *_table(headings, cells),
        "",
        *_baselines(found["baselines"]),
        "",
        *_operators(found["operators"]),
        f"Raw JSON: `docs/results/{file.name}`. Re-make: `{_command(found, file.name)}`",
        "",
    ]
    return "\n".join(lines)


def _baselines(baselines: list[dict[str, Any]]) -> list[str]:
    """What torch took in the same run."""
    rows = [
        [
            f"torch, {row['name']}",
            _optional(row["step_ms"], ",.0f"),
            _optional(row["step_ms"] and row["step_ms"] / baselines[0]["step_ms"], ".2f"),
            _optional(row["rss_anon_mb"], ",.0f"),
            _optional(row["rss_file_mb"], ",.0f"),
            row["note"] or _optional(row["grad_rel_error"], ".1e"),
        ]
        for row in baselines
    ]
    headings = ["", "step, ms", "of eager", "anonymous, MB", "file pages, MB", "gradient error"]
    return _table(headings, rows)


def _operators(found: dict[str, dict[str, float]]) -> list[str]:
    """Where the time goes, by operator, of each variant that was profiled."""
    lines = []
    for variant, numbers in found.items():
        times = {key[: -len(".ms")]: ms for key, ms in numbers.items() if key.endswith(".ms")}
        largest = sorted(times, key=lambda name: -times[name])[:MOST_OPERATORS]
        total = sum(times.values())
        parts = [f"{name} {times[name] / total:.0%}" for name in largest]
        lines.append(f"- operators of {variant}, {total:,.0f} ms: {', '.join(parts)}")
    return [*lines, ""] if lines else []


def _command(found: dict[str, Any], name: str) -> str:
    """The command that measures a case again."""
    case, rows = found["case"], found["rows"]
    words = ["edge-dit bench", f"--config {case['config']}"]
    words += ["--trained " + "+".join(map(str, case["trained"]))]
    words += [f"--{key} {case[key]}" for key in ("tokens", "text", "rank", "steps")]
    words += [] if case["full_lora"] else ["--no-full-lora"]
    words += [f"--baseline {baseline['name']}" for baseline in found["baselines"]]
    words += ["--profile"] if found["operators"] else []
    words += [f"--target {_name(row)}" for row in rows]
    return " ".join([*words, f"-o docs/results/{name}"])


def _name(row: dict[str, Any]) -> str:
    """A variant as `--target` takes it: "onnx:streamed:int8:int8"."""
    return str(TargetVariant(row["target"], row["layout"], row["dtype"], row["compute"]))


def _predictions() -> str:
    """What a budget predicts, beside what was measured."""
    found = json.loads(MEASURED.read_text())
    headings = ["", "blocks", "", "anonymous, MB", "", "file pages, MB", "", "step, ms", ""]
    kinds = {"anonymous": 1e6, "file": 1e6, "seconds": 1e-3}
    off = {
        kind: [row[f"predicted_{kind}"] / row[kind] - 1 for row in found["rows"]] for kind in kinds
    }
    cells = []
    for number, row in enumerate(found["rows"]):
        cells.append([row["case"], str(row["trained"]), row["execution"]])
        for kind, unit in kinds.items():
            cells[-1] += [f"{row[kind] / unit:,.0f}", f"{off[kind][number]:+.1%}"]
    worst = {kind: f"{min(values):+.1%} to {max(values):+.1%}" for kind, values in off.items()}
    lines = [
        "## Predicted and measured",
        "",
        "A budget (`[plan] ram`) goes by predictions. Here they are beside measurements, on",
        f"{found['machine']}. Figures are measured ones; the signed column after each is",
        "predicted / measured - 1. Below zero the prediction was too low.",
        "",
        *_table(headings, cells),
        "",
        f"Predictions were off by {worst['anonymous']} in anonymous memory, {worst['file']} in "
        f"file pages, {worst['seconds']} in time.",
        "",
        f"Raw JSON: `{MEASURED.relative_to(ROOT)}`. Re-make: "
        "`python tests/benchmarks/footprint.py WORK --write`",
        "",
    ]
    return "\n".join(lines)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---"] * len(headings)
    return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    DOCUMENT.write_text(render())
