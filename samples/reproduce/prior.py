"""Does [prior] keep what the base model does with other prompts, and what does it cost the subject?

    python samples/reproduce/prior.py WORK docs/results [MODEL ...]    # default both tiny models

Four toys, two seeds; patches of half the side, 30 % of the blocks skipped. Every
arm has `STEPS` steps on draws of the toy; an arm with a prior has prior draws besides. A toy's runs
of one arm lie in WORK; what is there is not repeated. Writes prior.json, prints docs/method.md's
table.

*Drift*: mean squared difference between the adapted and the base model's predictions on `SCENES`
drawn scenes with their own captions, none of which is a prompt of a prior, at eight noise levels,
the whole model, no block skipped. *Gain*: by how much the held-out loss of the toy is lower than
the base model's.

The criterion, fixed before the first run: the drift is at most half of that without a prior, and
the gain at least 98 % of it; means over the eight runs of a model, each arm judged by itself. The
last arm was added when those before it had been run on tiny-sana, and is judged by the same.
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from experiment import heldout_losses
from run import JOBS, SAMPLES
from runs import Run, model_for, pipeline_of, plan_for, subject_of
from side_by_side import ManySessions, add_many_lora, joined, remove_many_lora
from subjects import subjects, write_subject
from tables import mean_of, table

from edge_dit.contract.adamw import learning_rate
from edge_dit.contract.bank import draw_order
from edge_dit.contract.targets import WIDE
from edge_dit.models.families.family import State
from edge_dit.models.subgraph import TrainableSubgraph, lora_modules
from edge_dit.pictures.dataset import read_folder, with_prior
from edge_dit.pictures.draws import BankRequest, bank_index
from edge_dit.planning.plan import Plan, model_of
from edge_dit.planning.split import split_by_ratio
from edge_dit.reference.evaluate import LEVELS, Whole
from edge_dit.reference.precompute import Passed, source_of, tensors_of
from edge_dit.reference.prior import base_pictures
from edge_dit.store.files import write_json
from scenes import draw, random_scene

TOYS, SEEDS, STEPS, SKIPPED = 4, 2, 200, 0.3
SCENES, SCENES_SEED, PRIOR_SEED = 12, 23, 11
CLASS = ["a large toy"]
"""The captions of the toys without the word that names the toy."""


def kept_scenes(count: int) -> list[str]:
    """Captions of scenes for a prior, which are not those that drift is measured on."""
    rng = np.random.default_rng(PRIOR_SEED)
    return [random_scene(rng).caption() for _ in range(count)]


@dataclass(frozen=True)
class PriorArm:
    """A prior: its prompts, the share of the draws that are prior draws, and how many pictures the
    base model draws for them; 0 for the training pictures.
    """

    prompts: list[str]
    share: float
    drawn: int = 0

    def steps(self, own: int) -> int:
        """Steps of which ``own`` are on the subject's draws."""
        return round(own / (1 - self.share))


ARMS = {
    "without": PriorArm([], 0.0),
    "class, 1/4": PriorArm(CLASS, 0.25),
    "8 scenes, 1/4": PriorArm(kept_scenes(8), 0.25),
    "8 scenes drawn by the base model, 1/4": PriorArm(kept_scenes(8), 0.25, 8),
    "32 scenes drawn by the base model, 1/3": PriorArm(kept_scenes(32), 1 / 3, 32),
}


def plan_of(run: Run, arm: PriorArm) -> Plan:
    """The plan of a run, with the arm's steps and draws."""
    plan = plan_for(run)
    head, tail = split_by_ratio(plan.layers, SKIPPED)
    new = {"steps": arm.steps(plan.steps), "draws": arm.steps(plan.draws)}
    model = model_for(run.job)
    texts = [image.caption for image in subject_of(run.job, run.subject).train]
    tokens = model.family.text_tokens(model.folder, texts + arm.prompts)
    shares = {"prior_share": arm.share, "text_tokens": tokens}
    return plan.model_copy(update={"head_skip": head, "tail_skip": tail, **new, **shares})


@torch.no_grad()
def bank_of(run: Run, arm: PriorArm) -> list[dict[str, torch.Tensor]]:
    """The draws of a run, as precompute makes them; several go through a block together."""
    plan, model, pipeline = plan_of(run, arm), model_for(run.job), pipeline_of(run.job)
    pictures = read_folder(run.subject / "train", None, plan.s_max)
    if arm.prompts:
        drawn = []
        if arm.drawn:
            base = model_of(plan)
            folder = base_pictures(base, arm.prompts, arm.drawn, plan.s_max)
            drawn = read_folder(folder, None, plan.s_max)
        pictures = with_prior(pictures, arm.prompts, 1.0, drawn)
    asked = BankRequest("", plan.draws, plan.seed, plan.crop_rule, WIDE, 1, plan.prior_share)
    index = bank_index(asked, pictures, model.objective.level)
    prompts, images = dict(enumerate(index.prompts)), dict(enumerate(pictures))
    source = replace(source_of(plan, model, pipeline, prompts, images), listed=index.images)
    starts = [source.start(drawn) for drawn in index.draws]
    kept: list[dict[int, State]] = [{0: start.state} for start in starts]
    blocks = model.family.blocks(pipeline.transformer)
    for number, (name, block) in enumerate(blocks.items()):
        for first in range(0, len(starts), 16):
            some = range(first, min(first + 16, len(starts)))
            state = State(**joined([kept[n][number]._asdict() for n in some]))
            cond = joined([starts[n].cond for n in some])
            after = model.family.run_block(name, block, state, cond, plan.grid)
            for row, n in enumerate(some):
                image, text = (None if v is None else v[row : row + 1].clone() for v in after)
                assert image is not None
                kept[n][number + 1] = State(image, text)
    pairs = zip(starts, kept, strict=True)
    made = [
        tensors_of(plan, source, list(blocks), start, Passed(states, {})) for start, states in pairs
    ]
    return [{name: torch.from_numpy(value) for name, value in one.items()} for one in made]


def train(runs: list[Run], arm: PriorArm, banks: list[list[dict[str, torch.Tensor]]]) -> None:
    """Train the pipeline's own blocks in place, run r on rows r."""
    plan, pipeline = plan_of(runs[0], arm), pipeline_of(runs[0].job)
    family = model_for(runs[0].job).family
    modules = lora_modules(family, pipeline.transformer, plan.trained, plan.lora_targets, plan.tail)
    pipeline.transformer.requires_grad_(False)
    seeds = [run.seed for run in runs]
    layers = add_many_lora(pipeline.transformer, modules, plan.rank, plan.alpha, seeds)
    subgraph = TrainableSubgraph(pipeline.transformer, family, plan.trained, plan.grid, plan.tail)
    sessions = ManySessions(subgraph, layers, plan.optimizer)
    for step in range(plan.steps):
        batch = [
            bank[draw_order(step, len(bank), run.seed)]
            for bank, run in zip(banks, runs, strict=True)
        ]
        sessions.step(batch, learning_rate(step, plan.steps, plan.optimizer.lr))


# ---------------------------------------------------------------- measuring


@functools.cache
def scenes_of(job: Path) -> list[Whole]:
    """Scenes that drift is measured on, encoded."""
    model, pipeline, rng = model_for(job), pipeline_of(job), np.random.default_rng(SCENES_SEED)
    scenes = [random_scene(rng) for _ in range(SCENES)]
    assert not {scene.caption() for scene in scenes} & {p for a in ARMS.values() for p in a.prompts}
    encoded = []
    for scene in scenes:
        pixels = draw(scene, rng).astype(np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            clean = model.family.encode_image(
                pipeline.vae, torch.from_numpy(pixels), lambda shape: torch.zeros(shape)
            )
        tokens = model.family.text_tokens(model.folder, [scene.caption()])
        prompt = model.family.encode_prompts(pipeline, [scene.caption()], tokens)[0]
        side = pixels.shape[2] // model.multiple
        encoded.append(Whole(clean, prompt, (side, side)))
    return encoded


@torch.no_grad()
def predictions(job: Path, rows: int) -> list[torch.Tensor]:
    """Predictions of every scene at every level, [rows, ...] each, with the adapters in place."""
    model, transformer = model_for(job), pipeline_of(job).transformer
    found = []
    for number, scene in enumerate(scenes_of(job)):
        for level in range(LEVELS):
            sigma = (level + 0.5) / LEVELS
            generator = torch.Generator().manual_seed(LEVELS * number + level)
            noise = torch.randn(scene.clean.shape, generator=generator)
            inputs = model.family.inputs(
                transformer,
                model.objective.noised(scene.clean, noise, sigma),
                model.objective.timestep(sigma),
                scene.prompt,
                scene.grid,
            )
            predicted = transformer(**joined([inputs] * rows), return_dict=False)[0]
            found.append(model.family.learned(predicted))
    return found


@functools.cache
def base_of(job: Path) -> list[torch.Tensor]:
    """The base model's predictions; asked for before any adapter is there."""
    return predictions(job, 1)


def drift(job: Path, rows: int) -> list[float]:
    """Of every run."""
    pairs = zip(predictions(job, rows), base_of(job), strict=True)
    squares = [(found - base).square().flatten(1).mean(1).numpy() for found, base in pairs]
    return np.mean(squares, axis=0).tolist()


def execute(job: Path, arm: PriorArm, runs: list[Run]) -> list[dict[str, Any]]:
    """Train an arm's runs and measure them."""
    base_of(job)
    before = heldout_losses(runs)
    train(runs, arm, [bank_of(run, arm) for run in runs])
    after, drifted = heldout_losses(runs), drift(job, len(runs))
    remove_many_lora(pipeline_of(job).transformer)
    return [
        {
            "subject": run.subject.name,
            "seed": run.seed,
            "steps": arm.steps(STEPS),
            "base_loss": before[row],
            "heldout_loss": after[row],
            "drift": drifted[row],
        }
        for row, run in enumerate(runs)
    ]


def measured(name: str, work: Path) -> dict[str, list[dict[str, Any]]]:
    """Every arm's runs of a model, made or read."""
    job, folders = SAMPLES / JOBS[name], [work / "subjects" / toy for toy in [*subjects()][:TOYS]]
    for folder in folders:
        write_subject(folder.name, folder)
    runs = [Run(job, "skip-30", folder, seed, STEPS) for folder in folders for seed in range(SEEDS)]
    found = {}
    for title, arm in ARMS.items():
        path = work / name / f"{title.replace('/', '-')}.json"
        if not path.is_file():
            write_json(path, {"runs": execute(job, arm, runs)})
        found[title] = json.loads(path.read_text())["runs"]
        print(f"{name}: {title}", flush=True)
    return found


def verdict(without: list[dict[str, Any]], arm: list[dict[str, Any]]) -> dict[str, Any]:
    """An arm beside that without a prior."""
    gains = [
        np.array([r["base_loss"] - r["heldout_loss"] for r in some]) for some in (without, arm)
    ]
    drifts = [np.array([r["drift"] for r in some]) for some in (without, arm)]
    share, left = (float(of[1].mean() / of[0].mean()) for of in (gains, drifts))
    return {
        "gain": str(mean_of(gains[1].tolist())),
        "of the gain without": round(share, 4),
        "drift": str(mean_of(drifts[1].tolist())),
        "of the drift without": round(left, 4),
        "criterion": "holds" if left <= 0.5 and share >= 0.98 else "does not hold",
    }


def main(work: Path, out: Path, models: list[str]) -> None:
    everything = {name: measured(name, work.resolve()) for name in models or JOBS}
    rows = {
        name: {title: verdict(arms["without"], arm) for title, arm in arms.items()}
        for name, arms in everything.items()
    }
    prompts = {title: arm.prompts for title, arm in ARMS.items()}
    write_json(out / "prior.json", {"rows": rows, "prompts": prompts, "runs": everything})
    cells = [[m, a, *map(str, row.values())] for m, arms in rows.items() for a, row in arms.items()]
    print(table(["model", "prior", *next(iter(next(iter(rows.values())).values()))], cells))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
