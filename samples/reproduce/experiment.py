"""Train an arm on subjects and seeds side by side, in torch eager, and measure what it learned.

Every arm takes the same number of AdamW steps, one draw a step, with the same learning rate. An arm
that skips blocks reads a bank of draws, over and over, as a device would; an arm that stores
nothing has a new draw at every step, as training scripts do. Draw k is the same image, noise level,
noise and crop position in all of them.
"""

from __future__ import annotations

import functools
import io
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import ARMS, CROPS, NO_LORA, Arm, Skips, lora_blocks
from measures import adherence, similarity
from PIL import Image
from side_by_side import ManySessions, add_many_lora, joined, remove_many_lora
from subjects import HELD_OUT, VIEWS, caption
from torch import Tensor

from edge_dit.contract.adamw import learning_rate
from edge_dit.contract.bank import Draw, draw_order
from edge_dit.contract.names import STORED, Tail
from edge_dit.contract.noise import NOISE, POSTERIOR
from edge_dit.contract.targets import WIDE
from edge_dit.models.families.family import Grid, State
from edge_dit.models.int8_products import computing_in_int8
from edge_dit.models.model import Model
from edge_dit.models.patch_sampler import PatchSampler
from edge_dit.models.pipeline import load_pipeline
from edge_dit.models.subgraph import (
    TrainableSubgraph,
    as_batch,
    difference,
    inner_runs,
    lora_modules,
)
from edge_dit.pictures.crop import CropRule
from edge_dit.pictures.dataset import Captioned, read_folder
from edge_dit.pictures.draws import DrawRule
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import Plan, model_of
from edge_dit.planning.selection import NAME, Selection, read_selection
from edge_dit.planning.split import split_by_ratio
from edge_dit.reference.evaluate import LEVELS, Whole, encode_whole
from edge_dit.reference.precompute import normal_of
from training import Progress

GENERATION: dict[str, dict[str, Any]] = {
    "sana": {"guidance_scale": 2.0, "use_resolution_binning": False},
    "flux": {"guidance_scale": 3.5, "max_sequence_length": 32},
}
"""How pictures are drawn, by family."""
GENERATION_STEPS = 10
SELECTIONS = Path(__file__).resolve().parent / "selections"
"""What the paper's selector finds, by model."""


@dataclass(frozen=True)
class Run:
    """One arm on one subject with one seed.

    Attributes:
        job: job file: model, LoRA and optimizer; its images do not matter here.
        arm: its name in `arms.ARMS`.
        subject: folder of the subject, as `subjects.write_subject` writes it.
        seed: of LoRA, draws and generated pictures.
        steps: AdamW steps.
    """

    job: Path
    arm: str
    subject: Path
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.subject.name}-{self.seed}"


@dataclass(frozen=True)
class Subject:
    """A subject as a run needs it; one prompt a training image."""

    train: list[Captioned]
    prompts: list[dict[str, Tensor]]
    heldout: list[Whole]
    real: list[Image.Image]


@functools.cache
def plan_of(job: Path) -> Plan:
    return make_plan(read_job(job))


@functools.cache
def model_for(job: Path) -> Model:
    return model_of(plan_of(job), check=False)  # just hashed


@functools.cache
def pipeline_of(job: Path) -> Any:
    return load_pipeline(plan_of(job).model)


def plan_for(run: Run) -> Plan:
    """The job's plan with the run's sizes, steps and seed."""
    plan, share = plan_of(run.job), ARMS[run.arm].patch
    new = {
        "s_min": round(share * plan.s_max / plan.multiple) * plan.multiple,
        "steps": run.steps,
        # as many steps to a draw as the job has
        "draws": max(1, round(run.steps * plan.draws / plan.steps)),
        "seed": run.seed,
    }
    return plan.model_copy(update=new)


@functools.cache
def subject_of(job: Path, folder: Path) -> Subject:
    plan, model, pipeline = plan_of(job), model_for(job), pipeline_of(job)
    train, unseen = (read_folder(folder / part, None, plan.s_max) for part in VIEWS)
    captions = [image.caption for image in train]
    tokens = model.family.text_tokens(model.folder, captions)
    prompts = model.family.encode_prompts(pipeline, captions, tokens)
    real = [Image.open(folder / "heldout" / image.name).convert("RGB") for image in unseen]
    return Subject(train, prompts, encode_whole(plan, model, pipeline, unseen), real)


# ---------------------------------------------------------------- draws


@dataclass(frozen=True)
class Through:
    """A draw on its way: the states entering each block so far, and what goes with them."""

    states: list[State]
    cond: dict[str, Tensor]
    target: Tensor
    weight: float | None


def draws_of(run: Run, count: int) -> list[Draw]:
    plan, train = plan_for(run), subject_of(run.job, run.subject).train
    sizes = [image.size for image in train]
    level, prompts = model_for(run.job).objective.level, list(range(len(train)))
    return DrawRule(plan.seed, level, prompts, sizes, plan.crop_rule).draws(count)


@torch.no_grad()
def begin(run: Run, draw: Draw) -> Through:
    """A draw as it enters the first block (docs/method.md, Eq. 1)."""
    plan, pipeline, arm = plan_for(run), pipeline_of(run.job), ARMS[run.arm]
    subject, model = subject_of(run.job, run.subject), model_for(run.job)
    family, objective = model.family, model.objective
    chance = float(np.random.default_rng([draw.seed, 1]).random())
    share = 1.0 if arm.whole else CROPS[arm.crop](draw.sigma, chance)
    pixels = torch.from_numpy(subject.train[draw.image].pixels).unsqueeze(0)
    sampler = PatchSampler(replace(plan.crop_rule, s_min=side_of(arm, plan)))
    patch = sampler(pixels, torch.tensor([share]), torch.tensor([draw.u, draw.v]))
    posterior = functools.partial(normal_of, draw.seed, POSTERIOR)
    clean = family.encode_image(pipeline.vae, patch, posterior)
    noise = normal_of(draw.seed, NOISE, tuple(clean.shape))
    inputs = family.inputs(
        pipeline.transformer,
        objective.noised(clean, noise, draw.sigma),
        objective.timestep(draw.sigma),
        subject.prompts[draw.image],
        grid_of(side_of(arm, plan), plan),
    )
    state, cond = family.begin(pipeline.transformer, inputs)
    return Through([state], cond, objective.target(clean, noise), objective.weight(draw.sigma))


def side_of(arm: Arm, plan: Plan) -> int:
    """Pixels of what passes the first blocks."""
    return plan.s_max if arm.whole else plan.s_min


def grid_of(side: int, plan: Plan) -> Grid:
    """Token rows and columns of a square of ``side`` pixels."""
    return (side // plan.multiple,) * 2


@functools.lru_cache(maxsize=16)
@torch.no_grad()
def bank_of(
    job: Path, subject: Path, seed: int, steps: int, crop: str, patch: float
) -> list[Through]:
    """A bank's draws with the base model's states around every block: what any arm of this crop and
    patch that skips blocks may store (docs/method.md, Eq. 3).
    """
    like = next(
        n for n, arm in ARMS.items() if arm.banked and (arm.crop, arm.patch) == (crop, patch)
    )
    run = Run(job, like, subject, seed, steps)
    plan = plan_for(run)
    family = model_for(job).family
    drawn, grid = draws_of(run, plan.draws), grid_of(side_of(ARMS[like], plan), plan)
    draws = [begin(run, draw) for draw in drawn]
    for block in family.blocks(pipeline_of(job).transformer).values():
        for some in (draws[first : first + 16] for first in range(0, len(draws), 16)):
            before = [through.states[-1]._asdict() for through in some]
            cond = joined([through.cond for through in some])
            after = family.run_block(block, State(**joined(before)), cond, grid)
            for row, through in enumerate(some):
                part = [None if v is None else v[row : row + 1].clone() for v in after]
                through.states.append(State(*part))
    if crop == "window":
        return [window(one, draw, grid, plan.grid) for one, draw in zip(draws, drawn, strict=True)]
    return draws


def window(through: Through, draw: Draw, whole: Grid, patch: Grid) -> Through:
    """What a window of a whole picture's tokens holds of a draw, at the draw's place.

    Args:
        through: of the whole picture.
        draw: its u and v say where the window is.
        whole: token rows and columns of the picture, a square.
        patch: those of the window, a square.
    """
    place = CropRule(patch[0], whole[0], 1).crop(0.0, draw.u, draw.v, *whole)
    rows, columns = (slice(first, first + place.side) for first in (place.top, place.left))

    def cut(value: Tensor) -> Tensor:
        """Tokens [1, text + image, ...]: all of the text's, and the image's that are inside."""
        count = whole[0] * whole[1]
        text, image = value.split([value.shape[1] - count, count], 1)
        return torch.cat([text, image.unflatten(1, whole)[:, rows, columns].flatten(1, 2)], 1)

    states = [State(cut(state.image), state.text) for state in through.states]
    cond = {
        name: cut(value[None])[0] if name.startswith("rope_") else value
        for name, value in through.cond.items()
    }
    target = through.target
    if target.dim() == 4:  # latents [1, C, h, w], not tokens
        latents = target.shape[2] // whole[0]
        target = target.unflatten(3, (-1, latents)).unflatten(2, (-1, latents))
        target = target[:, :, rows, :, columns].flatten(4, 5).flatten(2, 3)
    else:
        target = cut(target)
    return Through(states, cond, target, through.weight)


def stored(
    through: Through, running: list[int], residuals: bool, kind: Tail = STORED
) -> dict[str, Tensor]:
    """What a bank keeps of a draw of which the blocks ``running`` run; without residuals a state
    passes the other blocks as it is, leading ones too. A tail that is not stored has none.
    """
    states, last = through.states, running[-1] + 1
    entry = states[running[0]] if len(states) > 1 and residuals else states[0]
    tail = torch.zeros_like(entry.image)
    if residuals and last < len(states):
        tail = states[-1].image - states[last].image
    runs = inner_runs(running).items()
    inner = {
        first: difference(states[behind if residuals else first], states[first])
        for behind, first in runs
    }
    kept = tail if kind == STORED else None
    return as_batch(entry, kept, through.cond, through.target, through.weight, inner)


# ---------------------------------------------------------------- training


def selection_of(plan: Plan, drawn: bool = False) -> Selection | None:
    """What the model's selection.json measured, or the paper's selector, if there is one."""
    file = SELECTIONS / f"{plan.model_name}.json" if drawn else plan.model / NAME
    return read_selection(file) if file.is_file() else None


def blocks_of(run: Run) -> list[int]:
    """Numbers of the blocks that carry LoRA; by the plan's split if no selection was measured."""
    plan = plan_of(run.job)

    def select(k: int, where: str) -> Skips:
        chosen = selection_of(plan, where == "drawn")
        better = chosen.proposed(k) if chosen and where == "proposed" else None
        if better is not None:
            return better.head_skip, better.tail_skip, [better.run]
        return *(chosen.best(k) if chosen else split_by_ratio(plan.layers, k / plan.layers)), []

    return lora_blocks(ARMS[run.arm], plan.layers, select)


def how_selected(job: Path) -> str:
    """A sentence or two on the "selected" blocks."""
    plan = plan_of(job)
    kinds = {"Selected": selection_of(plan), "Selected by pictures": selection_of(plan, True)}
    return " ".join(
        f'"{kind}" blocks are by the selector `{chosen.method}`, measured on '
        f"{' and '.join(chosen.subjects)}."
        if chosen
        else f'"{kind}" blocks are the planner\'s fixed split, as nothing was measured.'
        for kind, chosen in kinds.items()
    )


def settings(run: Run) -> dict[str, Any]:
    """All that decides a run's outcome, as JSON has it: a cached one with others is not used."""
    plan = plan_for(run)
    kept = ("model_hash", "rank", "alpha", "lora_targets", "optimizer", "s_min", "draws", "steps")
    images = subject_of(run.job, run.subject).train
    return {
        **plan.model_dump(mode="json", include=set(kept)),
        "arm": asdict(ARMS[run.arm]),
        "blocks": blocks_of(run),
        "images": [image.sha256 for image in images],
        "seed": run.seed,
        "generation_steps": GENERATION_STEPS,
    }


def train(runs: list[Run]) -> list[list[float]]:
    """Train the pipeline's own blocks in place, run r on rows r; the losses by step."""
    arm, pipeline = ARMS[runs[0].arm], pipeline_of(runs[0].job)
    plans = [plan_for(run) for run in runs]
    plan, family = plans[0], model_for(runs[0].job).family
    chosen = blocks_of(runs[0])
    running = chosen if arm.stand_in != "blocks" else list(range(plan.layers))
    if arm.banked:  # the same draws again and again
        banks = [bank_of(r.job, r.subject, r.seed, r.steps, arm.crop, arm.patch) for r in runs]
    else:
        fresh = [draws_of(run, plan.steps) for run in runs]

    def draw(row: int, step: int) -> dict[str, Tensor]:
        if arm.banked:
            through = banks[row][draw_order(step, plan.draws, runs[row].seed)]
        else:
            through = begin(runs[row], fresh[row][step])
        return stored(through, running, arm.stand_in == "residual", arm.tail)

    modules = lora_modules(family, pipeline.transformer, chosen, plan.lora_targets, arm.tail)
    seeds = [run.seed for run in runs]
    pipeline.transformer.requires_grad_(False)
    layers = add_many_lora(pipeline.transformer, modules, plan.rank, plan.alpha, seeds)
    grid = plan.grid if arm.banked else grid_of(side_of(arm, plan), plan)
    subgraph = TrainableSubgraph(pipeline.transformer, family, running, grid, arm.tail)
    sessions = ManySessions(subgraph, layers, plan.optimizer)
    progress, losses = Progress(runs[0].arm, 0, plan.steps), []
    with nullcontext() if arm.compute == WIDE else computing_in_int8(subgraph.blocks()):
        for step in range(plan.steps):
            batch = [draw(row, step) for row in range(len(runs))]
            lr = learning_rate(step, plan.steps, plan.optimizer.lr)
            losses.append(sessions.step(batch, lr))
            progress.add(step + 1, float(np.mean(losses[-1])))
    return losses


# ---------------------------------------------------------------- measuring


def heldout_losses(runs: list[Run]) -> list[float]:
    """`evaluate.heldout_loss` of every run: the whole model, no block skipped."""
    unseen = [subject_of(run.job, run.subject).heldout for run in runs]
    return np.mean(losses_by_level(runs, unseen), axis=1).tolist()


@torch.no_grad()
def losses_by_level(runs: list[Run], unseen: list[list[Whole]]) -> list[list[float]]:
    """For every run the mean loss over its pictures at each of `LEVELS` noise levels, ascending.

    Args:
        runs: of one arm, trained.
        unseen: pictures of each run, encoded, all of one size.
    """
    model, transformer = model_for(runs[0].job), pipeline_of(runs[0].job).transformer
    family, objective = model.family, model.objective
    losses: list[list[np.ndarray]] = [[] for _ in range(LEVELS)]
    for number in range(len(unseen[0])):
        for level in range(LEVELS):
            sigma, whole = (level + 0.5) / LEVELS, [images[number] for images in unseen]
            generator = torch.Generator().manual_seed(LEVELS * number + level)
            noise = torch.randn(whole[0].clean.shape, generator=generator)
            timestep = objective.timestep(sigma)
            inputs = [
                family.inputs(
                    transformer, objective.noised(w.clean, noise, sigma), timestep, w.prompt, w.grid
                )
                for w in whole
            ]
            found = family.learned(transformer(**joined(inputs), return_dict=False)[0])
            wanted = torch.cat([objective.target(w.clean, noise) for w in whole])
            losses[level].append((found - wanted).square().flatten(1).mean(1).numpy())
    return np.mean(losses, axis=1).T.tolist()


def generate(runs: list[Run]) -> list[list[Image.Image]]:
    """A picture of every held-out caption for each run."""
    plan, views = plan_for(runs[0]), len(HELD_OUT)
    pictures = pipeline_of(runs[0].job)(
        [caption(*view) for view in HELD_OUT for _ in runs],
        height=plan.s_max,
        width=plan.s_max,
        generator=[
            torch.Generator().manual_seed(views * run.seed + n)
            for n in range(views)
            for run in runs
        ],
        num_inference_steps=GENERATION_STEPS,
        **GENERATION[plan.family],
    ).images
    return [pictures[row :: len(runs)] for row in range(len(runs))]


def execute(runs: list[Run]) -> list[tuple[dict[str, Any], bytes]]:
    """Train and measure runs of one arm: their numbers, and their pictures side by side as PNG."""
    losses = train(runs) if runs[0].arm != NO_LORA else []
    heldout, drawn = heldout_losses(runs), generate(runs)
    remove_many_lora(pipeline_of(runs[0].job).transformer)
    outcomes = []
    for row, (run, pictures) in enumerate(zip(runs, drawn, strict=True)):
        right = [
            adherence(picture, *view) for picture, view in zip(pictures, HELD_OUT, strict=True)
        ]
        measured = {
            "heldout_loss": heldout[row],
            "similarity": similarity(pictures, subject_of(run.job, run.subject).real),
            "adherence": float(np.mean(right)),
            "train_loss": float(np.mean([step[row] for step in losses[-50:]])) if losses else None,
        }
        outcomes.append((measured, as_strip(pictures)))
    return outcomes


def as_strip(pictures: list[Image.Image]) -> bytes:
    """Pictures side by side, a PNG."""
    side = pictures[0].width
    strip = Image.new("RGB", (side * len(pictures), side))
    for number, picture in enumerate(pictures):
        strip.paste(picture, (number * side, 0))
    data = io.BytesIO()
    strip.save(data, "PNG")
    return data.getvalue()
