"""Runs the roads of several jobs, one after the other or side by side on a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_dit.app.run import Say, run
from edge_dit.cluster.pool import Pool
from edge_dit.errors import BadInput, raise_any
from edge_dit.planning.job import read_job
from edge_dit.progress import bar


@dataclass(frozen=True)
class Asked:
    """A job's road.

    Attributes:
        job: its file.
        out: folder for everything.
        target: the one to train; default the plan's first.
        any_memory: train even if less memory is free than is expected.
    """

    job: Path
    out: Path
    target: str | None
    any_memory: bool


def run_many(roads: Sequence[Asked], say: Say, pool: Pool | None = None) -> list[Path]:
    """Run all stages of several jobs, or continue them; the folder of each adapter.

    Args:
        roads: the jobs, each with a folder of its own.
        say: prints to the user.
        pool: a cluster: each job is a task. Its machines see jobs, models, pictures and folders at
            the same paths.

    Raises:
        BadInput: a job file has faults, all of them together; two jobs have the same folder; or a
            stage refuses its input.
        CheckFailed: a target does not compute what PyTorch computes.
    """
    if len({road.out for road in roads}) < len(roads):
        names = ", ".join(str(road.job) for road in roads)
        raise BadInput(
            "run", found=f"two files of the same name among {names}", expected="a name for each job"
        )
    faults = []
    for road in roads:
        try:
            read_job(road.job)
        except BadInput as fault:
            faults.append(fault)
    raise_any("run", faults)
    if pool is None:
        return [_road(say, road) for road in roads]
    adapters = []
    with bar("run", len(roads)) as advance:
        done = pool.map(_silence, _road, roads)
        for road, lora in zip(roads, done, strict=True):
            adapters.append(lora)
            advance(note=road.job.name)
            say(f"{road.job}: the adapter: {lora}")
    return adapters


def _road(say: Say, asked: Asked) -> Path:
    road = run(asked.job, asked.out, asked.target, say, asked.any_memory)
    return road.lora(asked.target or road.plan.targets[0])


def _silence() -> Say:
    return lambda what: None
