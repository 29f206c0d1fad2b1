"""Re-make the paper's ablations on a tiny checkpoint: train every arm, measure, tabulate.

    python samples/reproduce/run.py --work DIR [--model tiny-sana|tiny-flux] [--subjects 4]
        [--seeds 2] [--steps 200] [--only ARM ...] [--known RESULTS] [--jobs 2 | --ray [ADDRESS]]

Every run - an arm, a subject, a seed - leaves DIR/MODEL/runs/<name>.json and .png; one that is
there with the same settings is not repeated, so a stopped command goes on. In the end DIR/MODEL
holds results.json, results.md and the figures (see tables.py), from all runs with these settings.

With --known runs whose numbers are in a results.json, with the same settings, are taken from it,
without their pictures: to add arms to results/.

With --ray the arms are tasks of a Ray cluster, whose machines see samples/ and DIR at the same
paths. An arm's subjects and seeds train side by side, in one batch: an arm is the least that a task
can be, and one that was stopped is trained again whole, so that its bits are the same.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from arms import ARMS, MODELS, Arm
from experiment import execute, how_selected, selection_of, settings
from runs import Run, plan_of
from subjects import subjects, write_subject
from tables import collect, shared, write_results

from edge_dit.cluster.pool import LOCAL, connected
from edge_dit.planning.plan import Plan
from edge_dit.progress import bar
from edge_dit.store.files import write_atomic, write_json

SAMPLES = Path(__file__).resolve().parents[1]
JOBS = {model: f"{family}.toml" for model, family in MODELS.items()}


def all_runs(
    job: Path, work: Path, toys: int, seeds: int, steps: int, arms: Iterable[str]
) -> list[Run]:
    """Arm by arm, of those that the family can be and the model's selection proposes; subjects are
    written to ``work``/subjects.
    """
    plan = plan_of(job)
    folders = [work / "subjects" / name for name in list(subjects())[:toys]]
    for folder in folders:
        write_subject(folder.name, folder)
    return [
        Run(job, arm, folder, seed, steps)
        for arm in arms
        if ARMS[arm].family in ("", plan.family) and is_proposed(ARMS[arm], plan)
        for folder in folders
        for seed in range(seeds)
    ]


def is_proposed(arm: Arm, plan: Plan) -> bool:
    """Whether an arm that is for proposed splits has one."""
    selection = selection_of(plan)
    k = round(arm.skipped * plan.layers)
    return arm.where != "proposed" or (selection is not None and selection.proposed(k) is not None)


def is_done(run: Run, out: Path) -> bool:
    """Whether the run's file is there, made with the same settings."""
    try:
        return json.loads((out / f"{run.name}.json").read_text())["settings"] == settings(run)
    except (OSError, ValueError, KeyError):
        return False


def take_known(runs: list[Run], known: Path, out: Path) -> None:
    """Write files of the runs whose numbers are in a results.json, if they are not there."""
    results = json.loads(known.read_text())
    numbers = {(run["arm"], run["subject"], run["seed"]): run for run in results["runs"]}
    for run in runs:
        of = numbers.get((run.arm, run.subject.name, run.seed))
        if of is None or is_done(run, out):
            continue
        now, its = settings(run), results["arms"][run.arm]
        # An arm of before has what was added to arms since as it is by default.
        if {**its, "arm": {**asdict(Arm("", "")), **its["arm"]}} == shared(now):
            write_json(out / f"{run.name}.json", {**of, "settings": now})


def perform(runs: list[Run], out: Path) -> list[str]:
    """Execute what is missing of one arm's runs, side by side; the names of these."""
    missing = [run for run in runs if not is_done(run, out)]
    for group in batches(missing):
        write_runs(group, executed(None, group), out)
    return [run.name for run in missing]


def batches(runs: list[Run]) -> list[list[Run]]:
    """Runs in groups that train side by side: those of an arm, or of an arm and a seed."""
    keys = [
        (run.arm, run.seed if ARMS[run.arm].by_seed(plan_of(run.job).family) else 0) for run in runs
    ]
    return [
        [run for run, its in zip(runs, keys, strict=True) if its == key]
        for key in dict.fromkeys(keys)
    ]


Outcome = tuple[dict[str, Any], bytes]
"""A run's numbers with its settings, and its pictures."""


def executed(_: None, runs: list[Run]) -> list[Outcome]:
    """`execute` runs of one arm; ``seconds`` is what each took of the time of all."""
    begun = time.monotonic()
    outcomes = execute(runs)
    seconds = (time.monotonic() - begun) / len(runs)
    return [
        ({**measured, "seconds": seconds, "settings": settings(run)}, pictures)
        for run, (measured, pictures) in zip(runs, outcomes, strict=True)
    ]


def write_runs(runs: list[Run], outcomes: list[Outcome], out: Path) -> None:
    """Write the files of runs."""
    for run, (measured, pictures) in zip(runs, outcomes, strict=True):
        write_atomic(out / f"{run.name}.png", pictures)
        about = {"arm": run.arm, "subject": run.subject.name, "seed": run.seed}
        write_json(out / f"{run.name}.json", {**about, **measured})


def perform_on_cluster(runs: list[Run], out: Path, address: str) -> None:
    """Execute every batch of which a run is missing as a task of a Ray cluster."""
    missing = [group for group in batches(runs) if not all(is_done(run, out) for run in group)]
    with connected(address, threads=1) as pool, bar("arms", len(missing)) as advance:
        for group, outcomes in zip(missing, pool.map(nothing, executed, missing), strict=True):
            write_runs(group, outcomes, out)
            advance(note=group[0].arm)


def nothing() -> None:
    """What the tasks of a cluster share: `experiment` keeps what it opened by itself."""


def perform_all(runs: list[Run], out: Path, jobs: int) -> None:
    """`perform` every arm, ``jobs`` at a time, in order; a line for each with the minutes to go."""
    arms = {run.arm: [r for r in runs if r.arm == run.arm] for run in runs}
    context = multiprocessing.get_context("spawn")
    begun = time.monotonic()
    # Processes of one thread each are faster than threads on models this small.
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        waiting = {pool.submit(perform, group, out): arm for arm, group in arms.items()}
        for number, future in enumerate(as_completed(waiting), 1):
            made = len(future.result())
            left = (time.monotonic() - begun) / number * (len(arms) - number) / 60
            print(
                f"{waiting[future]}: {made} runs made, {number}/{len(arms)} arms, "
                f"about {left:.0f} min to go",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where results go")
    parser.add_argument("--model", choices=JOBS, default="tiny-sana")
    parser.add_argument("--subjects", type=int, default=4, choices=range(1, len(subjects()) + 1))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--known", type=Path, help="a results.json: its runs are not repeated")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--ray", nargs="?", const=LOCAL, metavar="ADDRESS", help="a Ray cluster")
    asked = parser.parse_args()
    work = asked.work.resolve() / asked.model
    job = SAMPLES / JOBS[asked.model]
    runs = all_runs(job, work, asked.subjects, asked.seeds, asked.steps, ARMS)
    wanted = [run for run in runs if run.arm in asked.only]
    if asked.known:
        take_known(runs, asked.known, work / "runs")
    if asked.ray:
        perform_on_cluster(wanted, work / "runs", asked.ray)
    else:
        perform_all(wanted, work / "runs", asked.jobs)
    done = [run.name for run in runs if is_done(run, work / "runs")]
    write_results(collect(done, work / "runs"), work, how_selected(job))
    print(work / "results.md")


if __name__ == "__main__":
    main()
