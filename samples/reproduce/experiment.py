"""Train an arm on subjects and seeds side by side, in torch eager, and measure what it learned.

Every arm takes the same number of AdamW steps, one draw a step, with the same learning rate. An arm
that skips blocks reads a bank of draws, over and over, as a device would; an arm that stores
nothing has a new draw at every step, as training scripts do. Draw k is the same image, noise level,
noise and crop position in all of them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import ARMS, INT4, NO_LORA, Skips, lora_blocks, ranks_by_block
from context import counting
from draws import Through, bank_of, begin, draws_of, stored
from four_bits import begin_in_four_bits, end_in_four_bits, measuring
from measures import adherence, similarity
from PIL import Image
from runs import Run, model_for, pipeline_of, plan_for, plan_of, subject_of
from side_by_side import ManySessions, add_many_lora, joined, remove_many_lora
from subjects import HELD_OUT, caption
from torch import Tensor

from edge_dit.contract.adamw import learning_rate
from edge_dit.contract.bank import draw_order
from edge_dit.contract.names import STORED, TAIL_RESIDUAL
from edge_dit.contract.targets import WIDE
from edge_dit.models.int8_products import computing_in_int8
from edge_dit.models.subgraph import TrainableSubgraph, conditioning_of, frozen_layers, lora_modules
from edge_dit.planning.plan import Plan
from edge_dit.planning.selection import NAME, Selection, read_selection
from edge_dit.planning.split import split_by_ratio
from edge_dit.reference.evaluate import LEVELS, Whole
from training import Progress

GENERATION: dict[str, dict[str, Any]] = {
    "sana": {"guidance_scale": 2.0, "max_sequence_length": 32, "use_resolution_binning": False},
    "flux": {"guidance_scale": 3.5, "max_sequence_length": 32},
}
"""How pictures are drawn, by family."""
GENERATION_STEPS = 10
SELECTIONS = Path(__file__).resolve().parent / "selections"
"""What the paper's selector finds, by model."""
NESTED = 2308
"""Seed of the ranks that steps train, where they are nested."""
CALIBRATION = 8
"""Draws of each run that tell how large a layer's inputs are."""


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


def ranks_of(run: Run, modules: list[str]) -> list[int]:
    """Rank of each LoRA module: of its block, by what the model's selection measured of that.

    A block's worth is the mean of what the loss grows by when it is the last of a head without
    LoRA, and the first of a tail.
    """
    plan, chosen = plan_of(run.job), blocks_of(run)
    selection = selection_of(plan)
    if selection is None:
        return [plan.rank] * len(modules)
    head, tail = (np.diff(of) for of in (selection.head, selection.tail_run or selection.tail))
    ranks = ranks_by_block(((head + tail[::-1]) / 2)[chosen].tolist(), plan.rank)
    blocks = model_for(run.job).family.blocks(pipeline_of(run.job).transformer)
    of = {list(blocks)[number]: rank for number, rank in zip(chosen, ranks, strict=True)}
    return [next(r for block, r in of.items() if name.startswith(f"{block}.")) for name in modules]


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


def hearing_blocks(run: Run) -> list[int]:
    """Numbers of the blocks that hear what is around a window: the trained ones, and the tail where
    it runs.
    """
    arm, chosen = ARMS[run.arm], blocks_of(run)
    tail = range(chosen[-1] + 1, plan_of(run.job).layers) if arm.tail != STORED else []
    return [*chosen, *tail] if arm.context else []


class Feed:
    """Which draw each run has in each turn; a step has as many turns as the arm has draws a step.

    Args:
        runs: of one arm.
    """

    def __init__(self, runs: list[Run]) -> None:
        self.runs, self.arm = runs, ARMS[runs[0].arm]
        plan = plan_for(runs[0])
        turns = plan.steps * self.arm.draws
        if not self.arm.banked:
            self.fresh = [draws_of(run, turns) for run in runs]
            return
        self.banks = [bank_of(run, hearing_blocks(runs[0])) for run in runs]
        self.orders = []
        for run, bank in zip(runs, self.banks, strict=True):
            order = [draw_order(turn, plan.draws, run.seed) for turn in range(turns)]
            if self.arm.order != "mixed":
                easy = self.arm.order == "easy first"
                order.sort(key=lambda number, bank=bank: bank[number].sigma, reverse=easy)
            self.orders.append(order)

    def at(self, turn: int) -> list[Through]:
        """A draw for each run: the same ones again and again where they are stored."""
        if not self.arm.banked:
            return [
                begin(run, fresh[turn]) for run, fresh in zip(self.runs, self.fresh, strict=True)
            ]
        pairs = zip(self.banks, self.orders, strict=True)
        return [bank[order[turn]] for bank, order in pairs]


class Trainer:
    """Trains the pipeline's own blocks in place, run r on rows r.

    Args:
        runs: of one arm; those of all seeds only where `Arm.by_seed` allows it.
    """

    def __init__(self, runs: list[Run]) -> None:
        self.arm, self.feed = ARMS[runs[0].arm], Feed(runs)
        self.plan, self.family = plan_for(runs[0]), model_for(runs[0].job).family
        arm, plan, chosen = self.arm, self.plan, blocks_of(runs[0])
        transformer = pipeline_of(runs[0].job).transformer
        self.running = chosen if arm.stand_in != "blocks" else list(range(plan.layers))
        modules = lora_modules(self.family, transformer, chosen, plan.lora_targets, arm.tail)
        seeds, orthogonal = [run.seed for run in runs], arm.start == "orthogonal"
        transformer.requires_grad_(False)
        ranks = ranks_of(runs[0], modules) if arm.by_block else []
        lora = add_many_lora(transformer, modules, plan.rank, plan.alpha, seeds, orthogonal, ranks)
        self.subgraph = TrainableSubgraph(
            transformer, self.family, self.running, plan.grid, arm.tail
        )
        self.sessions = ManySessions(self.subgraph, lora, plan.optimizer, arm.by_rows)
        blocks = list(self.family.blocks(transformer).items())
        self.blocks = [block for _, block in blocks]
        self.after = blocks[chosen[-1] + 1 :]
        self.lora, self.frozen = lora, frozen_layers(self.subgraph.blocks())
        self.prefixes = np.random.default_rng(NESTED)
        self.tails: dict[int, list[Tensor]] = {}

    def losses(self) -> list[list[float]]:
        """Train; the losses by step."""
        arm, plan = self.arm, self.plan
        progress, losses = Progress(arm.title, 0, plan.steps), []
        with self._counting(), self._computing():
            for step in range(plan.steps):
                first = step * arm.draws
                if arm.refresh and step % arm.refresh == 0:
                    ahead = range(first, min(first + arm.refresh, plan.steps))
                    self.tails = {turn: self._tail(turn) for turn in ahead}
                turns = [self.batch(first + turn) for turn in range(arm.draws)]
                if arm.nested:
                    self._use(plan.rank // int(self.prefixes.choice([1, 2, 4])))
                lr = learning_rate(step, plan.steps, plan.optimizer.lr)
                losses.append(self.sessions.step_of_several(turns, lr))
                progress.add(step + 1, float(np.mean(losses[-1])))
        self._use(arm.rank or plan.rank)
        return losses

    def _use(self, ranks: int) -> None:
        """Let the first of the ranks count."""
        for layer in self.lora:
            layer.used = ranks

    def _counting(self) -> AbstractContextManager[None]:
        """A context in which image tokens count as the arm has them."""
        if not self.arm.counted:
            return nullcontext()
        shown, whole = math.prod(self.plan.grid), (self.plan.s_max // self.plan.multiple) ** 2
        return counting(self.blocks, shown, whole / shown)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """A context in which the blocks' frozen matrices are as the arm has them."""
        if self.arm.compute == INT4:
            with measuring(self.lora) as sizes, torch.no_grad():
                for turn in range(min(CALIBRATION, self.plan.steps)):
                    self.sessions.trained(joined(self.batch(turn)))
            before = begin_in_four_bits(self.lora, self.frozen, sizes, self.arm.start)
            yield
            end_in_four_bits(self.lora, self.frozen, before)
        elif self.arm.compute == WIDE:
            yield
        else:
            with computing_in_int8(self.subgraph.blocks()):
                yield

    def batch(self, turn: int) -> list[dict[str, Tensor]]:
        """A draw for each run as it is trained on."""
        draws = self.feed.at(turn)
        tokens = draws[0].states[0].image.shape[1]
        self.subgraph.grid = (math.isqrt(tokens),) * 2
        residuals = self.arm.stand_in == "residual"
        batch = [stored(draw, self.running, residuals, self.arm.tail) for draw in draws]
        for draw, tail in zip(batch, self.tails.get(turn, ()), strict=False):
            draw[TAIL_RESIDUAL] = tail
        return batch

    @torch.no_grad()
    def _tail(self, turn: int) -> list[Tensor]:
        """Tail residuals of a turn's draws by the model as it is now, one for each run."""
        batch = joined(self.batch(turn))
        last = state = self.sessions.trained(batch)
        for block in self.after:
            last = self.family.run_block(*block, last, conditioning_of(batch), self.subgraph.grid)
        return list((last.image - state.image).split(1))


def train(runs: list[Run]) -> list[list[float]]:
    """Train the pipeline's own blocks in place, run r on rows r; the losses by step."""
    return Trainer(runs).losses()


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
    """A picture of every held-out caption for each run.

    Caption by caption: all at once, memory for what passes the blocks takes longer than the blocks.
    """
    plan, views = plan_for(runs[0]), len(HELD_OUT)
    draw = partial(
        pipeline_of(runs[0].job),
        height=plan.s_max,
        width=plan.s_max,
        num_inference_steps=GENERATION_STEPS,
        **GENERATION[plan.family],
    )
    by_view = [
        draw(
            [caption(*view)] * len(runs),
            generator=[torch.Generator().manual_seed(views * run.seed + n) for run in runs],
        ).images
        for n, view in enumerate(HELD_OUT)
    ]
    return [list(pictures) for pictures in zip(*by_view, strict=True)]


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
