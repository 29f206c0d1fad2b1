"""kill -9 at random moments over the stages; what is resumed must end at the same files.

    python tests/trust/kill.py --kills 200                   the small model, made in a minute
    python tests/trust/kill.py --kills 50 --stage train      one stage
    python tests/trust/kill.py --kills 6 --world DIR         of a folder that holds one already

Each stage runs in a process of its own, forked from this one, which has imported everything and
computed nothing. It is killed after a random share of the time that it takes undisturbed, then run
again to its end; every file must be the one of the undisturbed run. An export, which starts anew
each time and is long, is killed several times in a row before it may end.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
STAGES = ("precompute", "train", "adapter", "export")
STEPS = 40
SAVE_EVERY = 3
"""Steps between checkpoints, so that kills meet them."""
SHARD = 2
"""Draws in a shard, likewise."""
EXPORT_KILLS = 5
"""Of one export, before it may end."""

IMPORTED = (
    "edge_dit.reference.precompute",
    "edge_dit_export.export",
    "edge_dit_export.targets.onnx",
    "edge_dit_runtime.sessions.onnx",
    "edge_dit_runtime.training",
)
"""What the stages take seconds to import."""


@dataclass(frozen=True)
class World:
    """job.toml, model/, images/, plan.json, bank/ and an onnx bundle/."""

    folder: Path

    def path(self, name: str) -> Path:
        return self.folder / name


@dataclass
class Tally:
    """What happened to a stage."""

    kills: int = 0
    early: int = 0
    wrong: list[str] = field(default_factory=list)


def make_world(folder: Path) -> None:
    """The small pipeline of the tests, with plan, bank and bundle."""
    import tiny
    from edge_dit.pictures.dataset import read_folder
    from edge_dit.planning.job import read_job
    from edge_dit.planning.make import make_plan
    from edge_dit.reference.precompute import precompute
    from edge_dit_export.export import export

    parts = shutil.ignore_patterns("transformer")
    shutil.copytree(SAMPLES / "tiny-sana", folder / "model", ignore=parts)
    transformer = tiny.transformer(in_channels=8, caption_channels=96)
    transformer.save_pretrained(folder / "model" / "transformer")
    (folder / "images").mkdir()
    for source in sorted((SAMPLES / "subject" / "train").glob("*.png"))[:3]:
        shutil.copy(source, folder / "images")
    (folder / "job.toml").write_text(tiny.JOB)
    job = read_job(folder / "job.toml")
    plan = make_plan(job).model_copy(update={"targets": ["onnx"], "draws": 6})
    (folder / "plan.json").write_text(plan.model_dump_json())
    precompute(plan, read_folder(job.data.images, job.data.prompt, plan.s_max), folder / "bank")
    export(plan, folder / "bundle", ["onnx"])


def run_precompute(world: World, out: Path) -> None:
    import edge_dit.reference.precompute as module
    from edge_dit.pictures.dataset import read_folder
    from edge_dit.planning.job import read_job
    from edge_dit.planning.make import plan_of

    plan_index = module.plan_index

    def small_shards(*arguments: Any) -> Any:
        return replace(plan_index(*arguments), shard=SHARD)

    module.plan_index = small_shards
    job = read_job(world.path("job.toml"))
    plan = plan_of(job, world.path("plan.json"))
    images = read_folder(job.data.images, job.data.prompt, plan.s_max)
    module.precompute(plan, images, out)


def run_train(world: World, out: Path) -> None:
    import edge_dit_runtime.training as module
    from edge_dit_runtime import run_folder

    module.SAVE_EVERY = SAVE_EVERY
    run_folder.plot_losses = lambda *_: None  # a picture, and most of the time
    module.train(
        world.path("bundle"),
        world.path("bank"),
        out,
        target="onnx",
        steps=STEPS,
        resume=(out / run_folder.RUN).is_file(),
    )


def run_adapter(world: World, out: Path) -> None:
    from edge_dit.contract.adapter import write_adapter_folder
    from edge_dit_runtime.run_folder import RunFolder

    tensors, run = RunFolder(world.path("run")).adapter()
    write_adapter_folder(out, tensors, run.rank, run.alpha, run.base_model)


def run_export(world: World, out: Path) -> None:
    from edge_dit.planning.job import read_job
    from edge_dit.planning.make import plan_of
    from edge_dit_export.export import export

    job = read_job(world.path("job.toml"))
    export(plan_of(job, world.path("plan.json")), out, ["onnx"])


RUN: dict[str, Callable[[World, Path], None]] = {
    "precompute": run_precompute,
    "train": run_train,
    "adapter": run_adapter,
    "export": run_export,
}


def start(function: Callable[[], None]) -> int:
    """Run ``function`` in a forked process; its number."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(function: Callable[[], None]) -> float:
    """Run ``function`` in a process to its end; seconds it took."""
    started = time.monotonic()
    _, status = os.waitpid(start(function), 0)
    if status:
        raise RuntimeError(f"a stage that nobody killed ended with status {status}")
    return time.monotonic() - started


def killed(function: Callable[[], None], after: float) -> bool:
    """Run ``function`` in a process and kill it; whether it was still running then."""
    process = start(function)
    time.sleep(after)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if not os.WIFSIGNALED(status) and status:
        raise RuntimeError(f"a stage ended by itself with status {status}")
    return os.WIFSIGNALED(status)


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by name, except hidden ones and what tells times; may be empty."""
    from run_folders import timeless

    if not folder.exists():
        return {}
    paths = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name[0] != ".")
    return timeless({str(p.relative_to(folder)): p.read_bytes() for p in paths})


def leftovers(folder: Path) -> list[str]:
    """Unfinished folders and locks beside a stage's output."""
    return sorted(p.name for p in folder.parent.iterdir() if p.name.startswith(f".{folder.name}."))


def difference(want: dict[str, bytes], have: dict[str, bytes]) -> str:
    """The first file that differs, or nothing."""
    for name in sorted(want.keys() | have.keys()):
        if want.get(name) != have.get(name):
            there = "differs" if name in want and name in have else "is there in one run only"
            return f"{name} {there}"
    return ""


def try_stage(world: World, stage: str, kills: int, rng: random.Random, work: Path) -> Tally:
    """Kill a stage that many times, and compare what its resumed runs end at."""
    tally = Tally()
    run = RUN[stage]

    def going(out: Path) -> Callable[[], None]:
        return lambda: run(world, out)

    took = finish(going(work / "whole"))
    want = listing(work / "whole")
    number = 0
    while tally.kills < kills:
        number += 1
        out = work / f"killed-{number}"
        in_a_row = min(EXPORT_KILLS, kills - tally.kills) if stage == "export" else 1
        dead = 0
        for _ in range(in_a_row):
            if not killed(going(out), rng.uniform(0, took)):
                tally.early += 1
                took *= 0.8  # the machine has less to do than when it was measured
                break
            dead += 1
            if stage in ("adapter", "export") and listing(out) not in ({}, want):
                tally.wrong.append(f"{stage} {number}: a part of the folder is in place")
        finish(going(out))
        tally.kills += dead
        if dead and (found := difference(want, listing(out))):
            tally.wrong.append(f"{stage} {number}: {found}")
        if dead and stage in ("adapter", "export") and leftovers(out):
            tally.wrong.append(f"{stage} {number}: {leftovers(out)} were left")
        shutil.rmtree(out)
    return tally


def shares(kills: int, stages: list[str]) -> dict[str, int]:
    """So many kills among the stages: the long export gets a tenth."""
    if stages == ["export"]:
        return {"export": kills}
    quick = [stage for stage in stages if stage != "export"]
    export = -(-kills // 10) if "export" in stages else 0
    found = {stage: (kills - export) // len(quick) for stage in quick}
    found[quick[0]] += kills - export - sum(found.values())
    return {**found, **({"export": export} if export else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--stage", action="append", choices=STAGES, help="default: all")
    parser.add_argument("--world", type=Path, help="with job.toml, plan.json, bank/ and bundle/")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    for module in IMPORTED:
        importlib.import_module(module)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = asked.world
        if folder is None:
            folder = work / "made"
            folder.mkdir()
            finish(lambda: make_world(work / "made"))
        here = work / "world"  # a place to add a run
        here.mkdir()
        for entry in folder.iterdir():
            (here / entry.name).symlink_to(entry.resolve())
        world = World(here)
        stages = asked.stage or list(STAGES)
        if "adapter" in stages:
            finish(lambda: run_train(world, here / "run"))
        for stage, kills in shares(asked.kills, stages).items():
            (work / stage).mkdir()
            started = time.monotonic()
            tally = try_stage(world, stage, kills, random.Random(asked.seed), work / stage)
            print(
                f"{stage}: {tally.kills} kills, {len(tally.wrong)} wrong "
                f"({tally.early} came too late and do not count; "
                f"{time.monotonic() - started:.0f} s)",
                flush=True,
            )
            wrong += tally.wrong
    for line in wrong:
        print(line)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    tests = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(tests), str(tests / "trust")]
    main()
