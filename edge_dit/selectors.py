"""Measuring which blocks may be skipped (PAPER sec. 3, Algorithm 1, and two cheaper ways).

For each subject the whole model is LoRA-tuned at full resolution, then every head n and tail m is
measured by itself, so that one run serves every n + m = k:

    generation    D(x_g, x_n): distance between pictures generated with full attention and with the
                  text masked from the image in the first n (last m) blocks. The paper's.
    loss-masked   what that mask adds to the training loss: no sampling, no embedding.
    loss-frozen   what skipping those blocks would lose of the tuning: the loss when the first n
                  blocks go without their LoRA (their output is the stored entry state), or when the
                  last m are replaced by the base model's residual (Eq. 3), less the tuned loss. At
                  n = L and at m = L nothing is left of the tuning.

Losses are those of `edge_dit.evaluate.heldout_loss`: `LEVELS` noise levels for every image,
unweighted, of held-out images where a subject has some; else of its training images under noise
that tuning did not see.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from edge_dit.documents import digest, read_document, write_document
from edge_dit.embedding import distance, embedder
from edge_dit.errors import BadInput
from edge_dit.evaluate import LEVELS, Whole, encode_whole, train_full_lora
from edge_dit.families import family_of
from edge_dit.families.family import State
from edge_dit.images import Captioned
from edge_dit.masking import text_masked
from edge_dit.pipeline import load_pipeline
from edge_dit.plan import Plan, check_model
from edge_dit.progress import bar
from edge_dit.reference import objective_of
from edge_dit.selection import Selection
from edge_dit.subgraph import add_lora, lora_modules, lora_name, remove_lora
from edge_dit.tensors import TensorFile, write_tensors

UNSEEN = 1_000_000
"""Seed of the first measured noise: beyond those of `train_full_lora`, one a step from 0."""
PROMPTS = 2
"""Prompts a subject by default."""
SEEDS = (1, 2)
"""Of the pictures of a prompt, by default."""

Ends = tuple[list[float], list[float]]
"""head[0..L] and tail[0..L] of one subject."""


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
        embedding: see `edge_dit.embedding.embedder`.
        steps: tuning steps a subject; default ``plan.steps``.
        prompts: how many of a subject's captions to draw.
        seeds: of the pictures of each.

    Raises:
        BadInput: the model changed since the plan was made, or the embedding cannot be loaded.
    """
    bench = _Bench(plan, subjects, work, steps or plan.steps)
    embed = embedder(embedding, bench.pipeline)
    family, model = family_of(plan.family), bench.pipeline.transformer

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

    def measure(subject: Subject, title: str) -> Ends:
        whole = pictures(subject, range(0))
        return _generation_ends(plan.layers, lambda b: distance(whole, pictures(subject, b)), title)

    asked = {"embedding": [embed.name, embed.where], "prompts": prompts, "seeds": list(seeds)}
    head, tail, seconds = bench.run("generation", asked, measure)
    told = [prompt for subject in subjects for prompt in texts(subject)]
    return Selection(
        **bench.about,
        method="generation",
        embedding=embed.name,
        prompts=list(dict.fromkeys(told)),
        seeds=list(seeds),
        draws=len(told) * len(seeds),
        over="generated pictures",
        head=head,
        tail=tail,
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

    def measure(subject: Subject, title: str) -> Ends:
        images = encode_whole(plan, bench.pipeline, subject.measured)
        return _loss_ends(plan, bench.pipeline.transformer, images, frozen, title)

    method = "loss-frozen" if frozen else "loss-masked"
    head, tail, seconds = bench.run(method, {"levels": LEVELS}, measure)
    kinds = {"held-out" if subject.heldout else "training" for subject in subjects}
    return Selection(
        **bench.about,
        method=method,
        embedding="",
        prompts=[],
        seeds=[],
        draws=LEVELS * sum(len(subject.measured) for subject in subjects),
        over=f"{' and '.join(sorted(kinds))} images",
        head=head,
        tail=tail,
        seconds=seconds,
    )


# ---------------------------------------------------------------- what is measured


def _generation_ends(layers: int, measure: Callable[[range], float], title: str) -> Ends:
    """``measure`` of the first n blocks and of the last m; all of them are both."""
    with bar(title, 2 * layers - 1) as advance:

        def measured(blocks: range) -> float:
            value = measure(blocks)
            advance(note=f"blocks {blocks.start} to {blocks.stop - 1}: {value:.4f}")
            return value

        head = [0.0] + [measured(range(n)) for n in range(1, layers + 1)]
        tail = [measured(range(layers - m, layers)) for m in range(1, layers)]
    return head, [0.0, *tail, head[-1]]


def _loss_ends(plan: Plan, model: nn.Module, images: list[Whole], frozen: bool, title: str) -> Ends:
    draws = [
        (image, (level + 0.5) / LEVELS, UNSEEN + LEVELS * number + level)
        for number, image in enumerate(images)
        for level in range(LEVELS)
    ]
    with bar(title, len(draws)) as advance:
        losses = []
        for draw in draws:
            losses.append(_end_losses(plan, model, frozen, *draw))
            advance()
    head, tail = np.mean(losses, axis=0)
    return (head - head[0]).tolist(), (tail - tail[0]).tolist()


def _end_losses(
    plan: Plan, model: nn.Module, frozen: bool, whole: Whole, sigma: float, seed: int
) -> list[list[float]]:
    """Losses of one draw by head and by tail, [2, L + 1]; see the module.

    Args:
        plan: of the model.
        model: with a subject's LoRA.
        frozen: blocks at an end go without LoRA and a tail becomes the base model's residual; else
            their text is masked.
        whole: the image.
        sigma: noise level in (0, 1].
        seed: of the noise.
    """
    family, objective, last = family_of(plan.family), objective_of(plan), plan.layers
    blocks = list(family.blocks(model).values())
    noise = torch.randn(whole.clean.shape, generator=torch.Generator().manual_seed(seed))
    noised = objective.noised(whole.clean, noise, sigma)
    inputs = family.inputs(model, noised, objective.timestep(sigma), whole.prompt, whole.grid)
    start, cond = family.begin(model, inputs)

    def through(state: State, first: int) -> list[State]:
        """The states from block ``first`` on."""
        states = [state]
        for block in blocks[first:]:
            states.append(family.run_block(block, states[-1], cond, whole.grid))
        return states

    def impaired() -> AbstractContextManager[None]:
        return _without_lora(model) if frozen else text_masked(family, model, range(last))

    def loss(image: Tensor) -> float:
        found = family.learned(family.head(model, image, cond, whole.grid))
        return float(torch.nn.functional.mse_loss(found, objective.target(whole.clean, noise)))

    tuned = through(start, 0)
    with impaired():
        plain = through(start, 0)
        masked = [] if frozen else [through(state, k)[-1].image for k, state in enumerate(tuned)]
    skipped = [
        state.image + (plain[last].image - was.image)
        for state, was in zip(tuned, plain, strict=True)
    ]
    tails = skipped if frozen else masked
    heads = [through(plain[n], n)[-1].image for n in range(last + 1)]
    return [[loss(image) for image in images] for images in (heads, tails[::-1])]


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
def _wearing(plan: Plan, model: nn.Module, adapter: dict[str, np.ndarray]) -> Iterator[None]:
    """The model with an adapter of `train_full_lora`."""
    modules = lora_modules(family_of(plan.family), model, range(plan.layers), plan.lora_targets)
    _forget_lora(model)  # that of tuning
    add_lora(model, modules, plan.rank, plan.alpha, plan.seed)
    try:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(torch.from_numpy(adapter[lora_name(name)]))
        yield
    finally:
        remove_lora(model)
        _forget_lora(model)


def _forget_lora(model: nn.Module) -> None:
    """PEFT notes on a model what it put there, and warns of it for ever (peft 0.21)."""
    vars(model).pop("peft_config", None)


class _Bench:
    """Tunes subjects and measures them one by one, keeping in ``work`` what is finished."""

    def __init__(self, plan: Plan, subjects: Sequence[Subject], work: Path, steps: int) -> None:
        if not subjects:
            raise BadInput("subjects", found="none", expected="at least one folder of images")
        check_model(plan)
        self.plan, self.subjects, self.work, self.steps = plan, subjects, work, steps
        self.pipeline = load_pipeline(plan.model)
        self.about: dict[str, Any] = {
            "model_hash": plan.model_hash,
            "layers": plan.layers,
            "subjects": [subject.name for subject in subjects],
            "steps": steps,
        }

    def run(
        self, method: str, asked: dict[str, Any], measure: Callable[[Subject, str], Ends]
    ) -> tuple[list[float], list[float], float]:
        """Head and tail, mean over subjects, and the seconds that all of them took.

        Args:
            method: of the selection.
            asked: what besides subject and tuning decides the numbers.
            measure: measures a subject with the tuned model in place, under a bar's title.
        """
        kept = []
        for number, subject in enumerate(self.subjects, 1):
            seen = [(image.sha256, image.caption) for image in subject.measured]
            name = f"{method}-{digest([self._tuning(subject), asked, seen])}.json"
            title = f"{subject.name} ({number} of {len(self.subjects)}), {method}"
            kept.append(_kept(self.work / name, self.plan.layers))
            if kept[-1] is None:
                kept[-1] = self._measured(subject, title, measure)
                write_document(self.work / name, kept[-1])
        head, tail = (np.mean([k[end] for k in kept], axis=0).tolist() for end in ("head", "tail"))
        return head, tail, float(sum(k["seconds"] for k in kept))

    def _measured(
        self, subject: Subject, title: str, measure: Callable[[Subject, str], Ends]
    ) -> dict[str, Any]:
        started = time.monotonic()
        adapter = self._tuned(subject)
        with _wearing(self.plan, self.pipeline.transformer, adapter), torch.no_grad():
            head, tail = measure(subject, title)
        return {"head": head, "tail": tail, "seconds": time.monotonic() - started}

    def _tuned(self, subject: Subject) -> dict[str, np.ndarray]:
        path = self.work / f"tuned-{digest(self._tuning(subject))}.safetensors"
        if path.is_file():
            try:
                return TensorFile(path).read()
            except ValueError:
                path.unlink()
        images = encode_whole(self.plan, self.pipeline, subject.images)
        adapter = train_full_lora(self.plan, self.pipeline, images, self.steps)
        write_tensors(path, adapter)
        return adapter

    def _tuning(self, subject: Subject) -> dict[str, Any]:
        """All that decides what a subject's LoRA becomes."""
        names = {"model_hash", "s_max", "rank", "alpha", "lora_targets", "optimizer", "seed"}
        images = [(image.sha256, image.caption) for image in subject.images]
        plan = self.plan.model_dump(mode="json", include=names)
        return {**plan, "steps": self.steps, "images": images}


def _kept(path: Path, layers: int) -> dict[str, Any] | None:
    """A measurement that is there and whole."""
    try:
        found = read_document(path, "a measurement", "")
        values = np.array([found["head"], found["tail"]], dtype=float)
        whole = values.shape == (2, layers + 1) and np.isfinite([*values.flat, found["seconds"]])
    except (BadInput, ValueError, TypeError, KeyError):
        return None
    return found if np.all(whole) else None
