"""What a Ray cluster costs: `edge-dit precompute` with and without one, in turns, on this machine.

    OMP_NUM_THREADS=1 python tests/benchmarks/ray_overhead.py [--draws 400] [--runs 3] -o out.json

Each command is a process of its own, timed from its start to its end. The cluster is up before, and
has one processor, so that it computes with as much as the command alone. Its processes are new to
each command, as Ray's are.

Scaling is calculated, not measured: of a shard's time and the command's own processor time, which
two lengths of bank tell apart.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from edge_dit.store.files import write_json

SAMPLES = Path(__file__).resolve().parents[2] / "samples"


SHARD = 64  # draws of a task
MACHINES = (1, 2, 4, 8, 16, 64)
"""Processors that scaling is calculated for."""
BANKS = (400, 4_000)
"""Draws of the banks that it is calculated for."""


class Taken(NamedTuple):
    """Seconds of a command: of the wall clock, and of its own process's processor."""

    wall: float
    processor: float


def edge_dit(*arguments: str | Path) -> Taken:
    """Run a command; what it took."""
    begun = time.monotonic()
    command = [str(Path(sys.executable).with_name("edge-dit")), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, command
    return Taken(time.monotonic() - begun, used.ru_utime + used.ru_stime)


def calculated(short: Taken, long: Taken, draws: int, bank: int, processors: int) -> float:
    """Seconds of a bank's command on a cluster of more processors.

    Whole shards are computed side by side, and received and written one after the other.

    Args:
        short: what a bank of one shard took.
        long: what one of ``draws`` draws took.
        draws: of the second bank.
        bank: draws of the bank that is asked about.
        processors: of the cluster.
    """
    more = (draws - SHARD) / SHARD
    shard, written = ((b - a) / more for a, b in zip(short, long, strict=True))
    shards = math.ceil(bank / SHARD)
    computed = math.ceil(shards / processors) * shard
    return short.wall - shard + max(computed, shards * written)


def write_job(folder: Path, draws: int) -> Path:
    """samples/sana.toml with as many draws, and paths that do not depend on its place."""
    text = (SAMPLES / "sana.toml").read_text()
    for old, new in (
        ('"tiny-sana"', f'"{SAMPLES / "tiny-sana"}"'),
        ('"subject/train"', f'"{SAMPLES / "subject" / "train"}"'),
        ("draws = 400", f"draws = {draws}"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    folder.mkdir()
    (folder / "job.toml").write_text(text)
    return folder / "job.toml"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args()
    os.environ |= {"RAY_worker_niceness": "0"}  # 15 by default
    from ray.cluster_utils import Cluster

    cluster = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ray = ("--ray", cluster.address)
        jobs = {draws: write_job(folder / str(draws), draws) for draws in (SHARD, asked.draws)}
        plans = {draws: job.with_name("plan.json") for draws, job in jobs.items()}
        for draws, job in jobs.items():
            edge_dit("plan", job, "-o", plans[draws])
        for run in range(asked.runs):
            for draws, where, more in (
                (asked.draws, "alone", ()),
                (asked.draws, "cluster", ray),
                (SHARD, "cluster", ray),
            ):
                load = os.getloadavg()[0]
                bank = folder / f"{where}-{draws}-{run}"
                taken = edge_dit(
                    "precompute", jobs[draws], "--plan", plans[draws], "-o", bank, *more
                )
                row = {"run": run, "where": where, "draws": draws, "load": load}
                rows.append(row | {name: round(s, 2) for name, s in taken._asdict().items()})
                print(json.dumps(rows[-1]), flush=True)
    cluster.shutdown()

    def middle(where: str, draws: int) -> Taken:
        found = [row for row in rows if (row["where"], row["draws"]) == (where, draws)]
        return Taken(*(median(row[kind] for row in found) for kind in Taken._fields))

    alone, on, short = (
        middle(*key)
        for key in (("alone", asked.draws), ("cluster", asked.draws), ("cluster", SHARD))
    )
    over = round(on.wall / alone.wall - 1, 3)
    print(f"median: {alone.wall} s alone, {on.wall} s on the cluster: {over:+.1%}")
    scaling = {
        bank: {n: round(calculated(short, on, asked.draws, bank, n), 1) for n in MACHINES}
        for bank in BANKS
    }
    print("calculated seconds, by processors:", json.dumps(scaling))
    write_json(
        asked.output,
        {"draws": asked.draws, "rows": rows, "overhead": over, "calculated": scaling},
    )


if __name__ == "__main__":
    main()
