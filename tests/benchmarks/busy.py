"""How long `precompute` and `train` take beside other work, by how threads wait.

    python tests/benchmarks/busy.py WORK [--rounds 3] [--busy 2] [-o docs/results/busy.json]

samples/sana.toml with 40 draws and 40 steps, beside two processes that compute without end. Three
settings take turns: as shipped, OMP_WAIT_POLICY=PASSIVE given by hand, and ACTIVE, where waiting
threads spin as torch and onnxruntime do by themselves. A few minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from edge_dit.store.files import write_json

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"as shipped": None, "PASSIVE by hand": "PASSIVE", "ACTIVE": "ACTIVE"}
SIZE = 40
"""Draws of the bank, and training steps."""
LONGEST = 600
"""Seconds after which a command is stopped and counted as this long."""


@contextlib.contextmanager
def beside(count: int) -> Iterator[None]:
    """Keep ``count`` processes computing while the block runs."""
    loop = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(loop) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def edge_dit(policy: str | None, *arguments: object) -> float:
    """Seconds of a command with a wait policy; None is what the package sets itself."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
    command = [sys.executable, "-c", "from edge_dit.cli import main; main()"]
    started = time.monotonic()
    try:
        subprocess.run(
            [*command, *map(str, arguments)],
            env=environment,
            check=True,
            capture_output=True,
            timeout=LONGEST,
        )
    except subprocess.TimeoutExpired:
        return float(LONGEST)
    return time.monotonic() - started


def prepare(work: Path) -> tuple[Path, Path]:
    """The job of the shipped sample with `SIZE` draws and steps, and its plan; a bundle beside."""
    work.mkdir(parents=True, exist_ok=True)
    text = (ROOT / "samples" / "sana.toml").read_text()
    for old, new in (
        ("steps = 700", f"steps = {SIZE}"),
        ("draws = 400", f"draws = {SIZE}"),
        ('path = "tiny-sana"', f'path = "{ROOT / "samples" / "tiny-sana"}"'),
        ('images = "subject/train"', f'images = "{ROOT / "samples" / "subject" / "train"}"'),
    ):
        assert old in text, old
        text = text.replace(old, new)
    job, plan = work / "job.toml", work / "plan.json"
    job.write_text(text)
    edge_dit(None, "plan", job, "-o", plan)
    edge_dit(None, "precompute", job, "--plan", plan, "-o", work / "bank")
    edge_dit(None, "export", job, "--plan", plan, "-o", work / "bundle", "--target", "onnx")
    return job, plan


def measure(work: Path, rounds: int, busy: int) -> dict[str, object]:
    """Seconds by stage and setting, all rounds and their median."""
    job, plan = prepare(work)
    seconds: dict[str, dict[str, list[float]]] = {
        stage: {name: [] for name in SETTINGS} for stage in ("precompute", "train")
    }
    with beside(busy):
        for _ in range(rounds):
            for name, policy in SETTINGS.items():
                bank, run = work / "bank-again", work / "run"
                shutil.rmtree(bank, ignore_errors=True)
                shutil.rmtree(run, ignore_errors=True)
                seconds["precompute"][name].append(
                    edge_dit(policy, "precompute", job, "--plan", plan, "-o", bank)
                )
                seconds["train"][name].append(
                    edge_dit(policy, "train", work / "bundle", "--bank", work / "bank", "-o", run)
                )
                print(name, {stage: round(by[name][-1], 1) for stage, by in seconds.items()})
    medians = {s: {n: statistics.median(v) for n, v in by.items()} for s, by in seconds.items()}
    return {"busy": busy, "size": SIZE, "longest": LONGEST, "seconds": seconds, "median": medians}


def main() -> None:
    """Measure, print the medians, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    facts = measure(options.work, options.rounds, options.busy)
    print(json.dumps(facts["median"], indent=2))
    if options.output:
        write_json(options.output, facts)


if __name__ == "__main__":
    main()
