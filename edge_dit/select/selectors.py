"""Measuring which blocks may be skipped (docs/method.md, Algorithm 1, and two cheaper ways).

For each subject the whole model is LoRA-tuned at full resolution, then every head n and tail m is
measured by itself, so that one run serves every n + m = k:

    generation    D(x_g, x_n): distance between pictures generated with full attention and with the
                  text masked from the image in the first n (last m) blocks. The paper's.
    loss-masked   what that mask adds to the training loss: no sampling, no embedding.
    loss-frozen   what skipping those blocks would lose of the tuning: the loss when the first n
                  blocks go without their LoRA (their output is the stored entry state), or when the
                  last m are replaced by the base model's residual (Eq. 3), less the tuned loss. At
                  n = L and at m = L nothing is left of the tuning. Then, for every k, the likeliest
                  splits that also skip a run between trained blocks are measured as a whole beside
                  the best head and tail of as many blocks, see `_candidates`.

Losses are those of `edge_dit.reference.evaluate.heldout_loss`: `LEVELS` noise levels for every
image, unweighted, of held-out images where a subject has some; else of its training images under
noise that tuning did not see.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from edge_dit.errors import BadInput
from edge_dit.models.families.family import State
from edge_dit.models.model import Model
from edge_dit.models.pipeline import load_pipeline
from edge_dit.models.subgraph import add_lora, difference, lora_modules, lora_name, remove_lora
from edge_dit.pictures.images import Captioned
from edge_dit.planning.plan import Plan, model_of, trained_blocks
from edge_dit.planning.selection import Between, Selection
from edge_dit.progress import bar
from edge_dit.reference.evaluate import LEVELS, Whole, encode_whole
from edge_dit.reference.full_lora import train_full_lora
from edge_dit.select.embedding import distance, embedder
from edge_dit.select.masking import text_masked
from edge_dit.store.documents import digest, read_document, write_document
from edge_dit.store.tensors import TensorFile, write_tensors

UNSEEN = 1_000_000
"""Seed of the first measured noise: beyond those of `train_full_lora`, one a step from 0."""
PROMPTS = 2
"""Prompts a subject by default."""
SEEDS = (1, 2)
"""Of the pictures of a prompt, by default."""

SHORTLIST = 4
"""Splits with a run between trained blocks that are measured, for every k."""

Numbers = dict[str, np.ndarray]
"""What was measured of one subject, by name."""
Expected = dict[str, tuple[int, ...]]
"""Their shapes, by which what is kept is known to be whole."""


@dataclass(frozen=True)
class Subject:
    """Something to personalise to.

    Attributes:
        name: for people.
        images: to tune on, shorter side ``plan.s_max``.
        heldout: to measure on; may be empty.
    """

    name: str
    images: list[Captioned]
    heldout: list[Captioned] = field(default_factory=list)

    @property
    def measured(self) -> list[Captioned]:
        """The images whose captions and losses are measured."""
        return self.heldout or self.images


def select_by_generation(
    plan: Plan,
    subjects: Sequence[Subject],
    work: Path,
    *,
    embedding: str | None = None,
    steps: int | None = None,
    prompts: int = PROMPTS,
    seeds: Sequence[int] = SEEDS,
) -> Selection:
    """Algorithm 1 of the paper.

    Args:
        plan: of the model; its split does not matter.
        subjects: what to tune to.
        work: folder for what is finished of a selection, so that a stopped one goes on.
        embedding: see `edge_dit.select.embedding.embedder`.
        steps: tuning steps a subject; default ``plan.steps``.
        prompts: how many of a subject's captions to draw.
        seeds: of the pictures of each.

    Raises:
        BadInput: the model changed since the plan was made, or the embedding cannot be loaded.
    """
    bench = _Bench(plan, subjects, work, steps or plan.steps)
    embed = embedder(embedding, bench.pipeline)
    family, model = bench.model.family, bench.pipeline.transformer

    def texts(subject: Subject) -> list[str]:
        return list(dict.fromkeys(image.caption for image in subject.measured))[:prompts]

    def pictures(subject: Subject, blocks: range) -> Tensor:
        with text_masked(family, model, blocks):
            drawn = [
                picture
                for prompt in texts(subject)
                for picture in family.sample(bench.pipeline, prompt, plan.s_max, list(seeds))
            ]
        return embed(drawn)

    def measure(subject: Subject, title: str) -> Numbers:
        whole = pictures(subject, range(0))
        return _generation_ends(plan.layers, lambda b: distance(whole, pictures(subject, b)), title)

    asked = {"embedding": [embed.name, embed.where], "prompts": prompts, "seeds": list(seeds)}
    kept, seconds = bench.run("generation", asked, lambda _: bench.ends, measure)
    told = [prompt for subject in subjects for prompt in texts(subject)]
    return Selection(
        **bench.about,
        method="generation",
        embedding=embed.name,
        prompts=list(dict.fromkeys(told)),
        seeds=list(seeds),
        draws=len(told) * len(seeds),
        over="generated pictures",
        **_mean_ends(kept),
        seconds=seconds,
    )


def select_by_loss(
    plan: Plan,
    subjects: Sequence[Subject],
    work: Path,
    *,
    frozen: bool = True,
    steps: int | None = None,
) -> Selection:
    """The selectors that generate nothing.

    Args:
        plan, subjects, work, steps: see `select_by_generation`; with the same work folder tuning is
            not repeated.
        frozen: measure "loss-frozen", else "loss-masked".

    Raises:
        BadInput: the model changed since the plan was made.
    """
    bench = _Bench(plan, subjects, work, steps or plan.steps)
    layers = plan.layers
    runs = _runs(layers) if frozen else []
    splits = [trained_blocks(layers, n, 0) for n in range(layers + 1)]
    splits += [trained_blocks(layers, 0, m) for m in range(layers + 1)]
    splits += [trained_blocks(layers, 0, 0, [run]) for run in runs]

    def measure(subject: Subject, title: str) -> Numbers:
        found = bench.losses(subject, splits if frozen else None, title).mean(axis=0)
        head, tail, alone = np.split(found, [layers + 1, 2 * (layers + 1)])
        return {"head": head - head[0], "tail": tail - tail[0], "runs": alone - head[0]}

    method = "loss-frozen" if frozen else "loss-masked"
    shapes = {**bench.ends, "runs": (len(runs),)}
    kept, seconds = bench.run(method, {"levels": LEVELS}, lambda _: shapes, measure)
    kinds = {"held-out" if subject.heldout else "training" for subject in subjects}
    selection = Selection(
        **bench.about,
        method=method,
        embedding="",
        prompts=[],
        seeds=[],
        draws=LEVELS * sum(len(subject.measured) for subject in subjects),
        over=f"{' and '.join(sorted(kinds))} images",
        **_mean_ends(kept),
        seconds=seconds,
    )
    alone = np.mean([numbers["runs"] for numbers in kept], axis=0).tolist()
    between, more = _between(bench, selection, dict(zip(runs, alone, strict=True)))
    return selection.model_copy(update={"between": between, "seconds": seconds + more})


def _between(
    bench: _Bench, selection: Selection, runs: dict[tuple[int, int], float]
) -> tuple[list[Between], float]:
    """`Selection.between` and the seconds that it took.

    Args:
        bench: of the model and its subjects.
        selection: heads and tails.
        runs: what skipping each costs alone.
    """
    layers = selection.layers
    model = bench.pipeline.transformer
    blocks = bench.model.family.blocks(model).values()
    candidates = _candidates(selection, runs, [type(block) for block in blocks])
    images = sum(len(subject.measured) for subject in bench.subjects)
    if not candidates or images < 2:  # one image has no standard error
        return [], 0.0
    best = {k: selection.best(k) for k in dict.fromkeys(split.skipped for split in candidates)}
    splits = [trained_blocks(layers, head, tail) for head, tail in best.values()]
    splits += [trained_blocks(layers, s.head_skip, s.tail_skip, [s.run]) for s in candidates]
    kept, seconds = bench.run(
        "inner-runs",
        {"levels": LEVELS, "splits": splits},
        lambda subject: {"losses": (len(subject.measured), len(splits))},
        lambda subject, title: {"losses": bench.losses(subject, splits, title)},
    )
    losses = np.concatenate([numbers["losses"] for numbers in kept]).T
    of_best = dict(zip(best, losses, strict=False))
    measured = [
        split.model_copy(update=_gain(of_best[split.skipped] - lost))
        for split, lost in zip(candidates, losses[len(best) :], strict=True)
    ]
    return [
        max((s for s in measured if s.skipped == k), key=lambda s: s.gain) for k in best
    ], seconds


# ---------------------------------------------------------------- what is measured


def _runs(layers: int) -> list[tuple[int, int]]:
    """Runs [first, end) between trained blocks that are measured alone: of 1, 2, 4, ... blocks,
    half of a run from one to the next.
    """
    lengths = [2**power for power in range(layers.bit_length()) if 2**power <= layers - 2]
    return [
        (first, first + length)
        for length in lengths
        for first in range(1, layers - length, max(1, length // 2))
    ]


def _candidates(
    selection: Selection, runs: dict[tuple[int, int], float], kinds: Sequence[type]
) -> list[Between]:
    """For every k the `SHORTLIST` of splits with one of ``runs`` that promise most: those whose
    parts cost least in sum. Only such as leave the kinds of blocks to train that the best head and
    tail of k blocks leave, so that memory is the same.

    Args:
        selection: heads and tails.
        runs: what each costs alone.
        kinds: of the model's blocks.
    """
    layers, found = selection.layers, []
    for skipped in range(1, layers - 1):
        left = Counter(kinds[n] for n in trained_blocks(layers, *selection.best(skipped)))
        splits = [
            (selection.score(head, tail) + cost, Between(head_skip=head, tail_skip=tail, run=run))
            for run, cost in runs.items()
            for head in range(min(run[0], skipped - (run[1] - run[0]) + 1))
            for tail in [skipped - (run[1] - run[0]) - head]
            if run[1] < layers - tail
            and Counter(kinds[n] for n in trained_blocks(layers, head, tail, [run])) == left
        ]
        found += [split for _, split in sorted(splits, key=lambda pair: pair[0])[:SHORTLIST]]
    return found


def _gain(losses: np.ndarray) -> dict[str, float]:
    """Mean and its standard error."""
    return {"gain": float(losses.mean()), "error": float(losses.std(ddof=1) / len(losses) ** 0.5)}


def _generation_ends(layers: int, measure: Callable[[range], float], title: str) -> Numbers:
    """``measure`` of the first n blocks and of the last m; all of them are both."""
    with bar(title, 2 * layers - 1) as advance:

        def measured(blocks: range) -> float:
            value = measure(blocks)
            advance(note=f"blocks {blocks.start} to {blocks.stop - 1}: {value:.4f}")
            return value

        head = [0.0] + [measured(range(n)) for n in range(1, layers + 1)]
        tail = [measured(range(layers - m, layers)) for m in range(1, layers)]
    return {"head": np.array(head), "tail": np.array([0.0, *tail, head[-1]])}


def _losses(
    model: Model,
    transformer: nn.Module,
    images: list[Whole],
    splits: list[list[int]] | None,
    title: str,
) -> np.ndarray:
    """Losses by image, mean over levels, and by split - or, without splits, with masked text by
    head 0..L and then tail 0..L.
    """
    found: list[list[float]] = []
    with bar(title, LEVELS * len(images)) as advance:
        for number, image in enumerate(images):
            for level in range(LEVELS):
                sigma = (level + 0.5) / LEVELS
                draw = _Draw(model, transformer, image, sigma, LEVELS * number + level)
                found.append(draw.masked() if splits is None else draw.frozen(splits))
                advance()
    return np.array(found).reshape(len(images), LEVELS, -1).mean(axis=1)


class _Draw:
    """A noised image and its way through the tuned model.

    Args:
        model: that is tuned.
        transformer: of it, with a subject's LoRA.
        whole: the image.
        sigma: noise level in (0, 1].
        number: of the draw; its noise follows from it.
    """

    def __init__(
        self, model: Model, transformer: nn.Module, whole: Whole, sigma: float, number: int
    ) -> None:
        self.family, self.model, self.grid = model.family, transformer, whole.grid
        self.blocks = list(self.family.blocks(transformer).values())
        objective = model.objective
        seeded = torch.Generator().manual_seed(UNSEEN + number)
        noise = torch.randn(whole.clean.shape, generator=seeded)
        noised = objective.noised(whole.clean, noise, sigma)
        timestep = objective.timestep(sigma)
        inputs = self.family.inputs(transformer, noised, timestep, whole.prompt, whole.grid)
        self.start, self.cond = self.family.begin(transformer, inputs)
        self.target = objective.target(whole.clean, noise)
        self.tuned = self._through(self.start, 0)

    def _through(self, state: State, first: int) -> list[State]:
        """The states from block ``first`` on."""
        states = [state]
        for block in self.blocks[first:]:
            states.append(self.family.run_block(block, states[-1], self.cond, self.grid))
        return states

    def _loss(self, image: Tensor) -> float:
        found = self.family.learned(self.family.head(self.model, image, self.cond, self.grid))
        return float(torch.nn.functional.mse_loss(found, self.target))

    def frozen(self, splits: list[list[int]]) -> list[float]:
        """With the base model's residual in place of all blocks but those of a split."""
        with _without_lora(self.model):
            plain = self._through(self.start, 0)
        return [self._loss(self._replayed(split, plain).image) for split in splits]

    def _replayed(self, trained: list[int], plain: list[State]) -> State:
        """The state behind the last block, where only ``trained`` ones run."""
        state, number = plain[0], 0
        for block in trained:
            if block > number:
                state = _moved(state, plain[number], plain[block])
            if state is self.tuned[block]:  # up to the first gap
                state = self.tuned[block + 1]
            else:
                state = self.family.run_block(self.blocks[block], state, self.cond, self.grid)
            number = block + 1
        return _moved(state, plain[number], plain[-1]) if number < len(self.blocks) else state

    def masked(self) -> list[float]:
        """With the text masked from the image, by head and then by tail."""
        layers = len(self.blocks)
        with text_masked(self.family, self.model, range(layers)):
            heads = self._through(self.start, 0)
            tails = [self._through(state, k)[-1] for k, state in enumerate(self.tuned)]
        heads = [self._through(state, n)[-1] for n, state in enumerate(heads)]
        return [self._loss(state.image) for state in [*heads, *tails[::-1]]]


def _moved(state: State, before: State, after: State) -> State:
    """``state`` with what skipped blocks would add to it by the base model (Eq. 3)."""
    if state is before:
        return after
    residual = difference(after, before)
    image = state.image + residual.image
    if state.text is None or residual.text is None:
        return State(image)
    return State(image, state.text + residual.text)


def _mean_ends(kept: list[Numbers]) -> dict[str, Any]:
    return {end: np.mean([k[end] for k in kept], axis=0).tolist() for end in ("head", "tail")}


# ---------------------------------------------------------------- tuning, and what is kept


@contextmanager
def _without_lora(model: nn.Module) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def _wearing(
    plan: Plan, model: Model, transformer: nn.Module, adapter: dict[str, np.ndarray]
) -> Iterator[None]:
    """The transformer with an adapter of `train_full_lora`."""
    modules = lora_modules(model.family, transformer, range(plan.layers), plan.lora_targets)
    _forget_lora(transformer)  # that of tuning
    add_lora(transformer, modules, plan.rank, plan.alpha, plan.seed)
    try:
        for name, parameter in transformer.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(torch.from_numpy(adapter[lora_name(name)]))
        yield
    finally:
        remove_lora(transformer)
        _forget_lora(transformer)


def _forget_lora(model: nn.Module) -> None:
    """PEFT notes on a model what it put there, and warns of it for ever (peft 0.21)."""
    vars(model).pop("peft_config", None)


class _Bench:
    """Tunes subjects and measures them one by one, keeping in ``work`` what is finished."""

    def __init__(self, plan: Plan, subjects: Sequence[Subject], work: Path, steps: int) -> None:
        if not subjects:
            raise BadInput("subjects", found="none", expected="at least one folder of images")
        self.model = model_of(plan)
        self.plan, self.subjects, self.work, self.steps = plan, subjects, work, steps
        self.pipeline = load_pipeline(plan.model)
        self.about: dict[str, Any] = {
            "model_hash": plan.model_hash,
            "layers": plan.layers,
            "subjects": [subject.name for subject in subjects],
            "steps": steps,
        }
        self.ends: Expected = {"head": (plan.layers + 1,), "tail": (plan.layers + 1,)}

    def run(
        self,
        method: str,
        asked: dict[str, Any],
        shapes: Callable[[Subject], Expected],
        measure: Callable[[Subject, str], Numbers],
    ) -> tuple[list[Numbers], float]:
        """What was measured of each subject, and the seconds that all of them took.

        Args:
            method: name of the measurement.
            asked: what besides subject and tuning decides the numbers.
            shapes: of a subject's numbers.
            measure: measures a subject with the tuned model in place, under a bar's title.
        """
        kept, seconds = [], 0.0
        for number, subject in enumerate(self.subjects, 1):
            seen = [(image.sha256, image.caption) for image in subject.measured]
            path = self.work / f"{method}-{digest([self._tuning(subject), asked, seen])}.json"
            title = f"{subject.name} ({number} of {len(self.subjects)}), {method}"
            found = _kept(path, shapes(subject))
            if found is None:
                found = self._measured(subject, title, measure)
                write_document(path, {name: value.tolist() for name, value in found.items()})
            seconds += float(found.pop("seconds"))
            kept.append(found)
        return kept, seconds

    def losses(self, subject: Subject, splits: list[list[int]] | None, title: str) -> np.ndarray:
        """See `_losses`."""
        images = encode_whole(self.plan, self.model, self.pipeline, subject.measured)
        return _losses(self.model, self.pipeline.transformer, images, splits, title)

    def _measured(
        self, subject: Subject, title: str, measure: Callable[[Subject, str], Numbers]
    ) -> Numbers:
        started = time.monotonic()
        adapter = self._tuned(subject)
        transformer = self.pipeline.transformer
        with _wearing(self.plan, self.model, transformer, adapter), torch.no_grad():
            found = measure(subject, title)
        return {**found, "seconds": np.array(time.monotonic() - started)}

    def _tuned(self, subject: Subject) -> dict[str, np.ndarray]:
        path = self.work / f"tuned-{digest(self._tuning(subject))}.safetensors"
        if path.is_file():
            try:
                return TensorFile(path).read()
            except ValueError:
                path.unlink()
        images = encode_whole(self.plan, self.model, self.pipeline, subject.images)
        adapter = train_full_lora(self.plan, self.model, self.pipeline, images, self.steps)
        write_tensors(path, adapter)
        return adapter

    def _tuning(self, subject: Subject) -> dict[str, Any]:
        """All that decides what a subject's LoRA becomes."""
        names = {"model_hash", "s_max", "rank", "alpha", "lora_targets", "optimizer", "seed"}
        images = [(image.sha256, image.caption) for image in subject.images]
        plan = self.plan.model_dump(mode="json", include=names)
        return {**plan, "steps": self.steps, "images": images}


def _kept(path: Path, shapes: Expected) -> Numbers | None:
    """A measurement that is there and whole."""
    try:
        raw = read_document(path, "a measurement", "")
        found = {name: np.array(raw[name], dtype=float) for name in [*shapes, "seconds"]}
    except (BadInput, ValueError, TypeError, KeyError):
        return None
    whole = all(found[name].shape == shape for name, shape in {**shapes, "seconds": ()}.items())
    return found if whole and all(np.isfinite(v).all() for v in found.values()) else None
