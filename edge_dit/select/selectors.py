"""Measures what skipping each head and each tail of blocks costs (docs/method.md, Eq. 2).

For every subject the whole model is LoRA-tuned at full resolution. Then every head of n blocks and
every tail of m blocks is measured by itself, so that one measurement serves every n + m = k. There
are three ways to measure; `Selection.method` names the one used:

    generation    Algorithm 1 of the paper. Pictures are generated with full attention, and again
                  with the text masked from the image in the first n (last m) blocks. The cost is
                  the distance D between them.
    loss-masked   The cost is what the same mask adds to the training loss. No picture is generated.
    loss-frozen   The cost is how much of the tuning is lost. The first n blocks run without their
                  LoRA; or the last m are replaced by the base model's residual (Eq. 3), or run
                  without their LoRA. At n = L and at m = L nothing is left of the tuning. Splits
                  that skip a run of blocks between trained ones are measured too, see
                  `edge_dit.select.inner_runs`.

Losses are measured on held-out images where a subject has some, else on its training images, under
noise that tuning did not see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from edge_dit.cluster.pool import Pool
from edge_dit.contract.split import trained_blocks
from edge_dit.planning.plan import Plan
from edge_dit.planning.selection import Selection
from edge_dit.progress import bar
from edge_dit.reference.evaluate import LEVELS
from edge_dit.select.embedding import distance, embedder
from edge_dit.select.inner_runs import best_inner_runs, by_splits, runs_to_measure
from edge_dit.select.masking import text_masked
from edge_dit.select.replay import losses_of_run_tails, losses_with_masked_text
from edge_dit.select.subjects import Subject, TunedSubjects

PROMPTS = 2
"""Captions of a subject that pictures are generated for, by default."""
SEEDS = (1, 2)
"""Seeds of the pictures of a prompt, by default."""


@dataclass(frozen=True)
class Drawn:
    """The pictures that are drawn of a subject, and how they are compared.

    Attributes:
        embedding: folder or hub id of DINO, DINOv2 or CLIP; default the model's own autoencoder.
        prompts: how many of a subject's captions pictures are drawn for.
        seeds: of the pictures of each caption.
    """

    embedding: str | None = None
    prompts: int = PROMPTS
    seeds: tuple[int, ...] = SEEDS


def select_by_generation(
    plan: Plan,
    subjects: Sequence[Subject],
    work: Path,
    *,
    drawn: Drawn = Drawn(),
    steps: int | None = None,
    pool: Pool | None = None,
) -> Selection:
    """Measure heads and tails by generated pictures: Algorithm 1 of the paper.

    Args:
        plan: of the model; which blocks it skips does not matter.
        subjects: to tune to.
        work: folder for what is finished; a selection that was stopped continues from it.
        drawn: which pictures, and how they are compared.
        steps: tuning steps for each subject; default ``plan.steps``.
        pool: a cluster that tunes and measures, see `TunedSubjects`.

    Raises:
        BadInput: no subject, the model changed since the plan was made, or the embedding cannot be
            loaded.
    """
    tuned = TunedSubjects(plan, subjects, work, steps or plan.steps, pool)
    embed = embedder(drawn.embedding, tuned.pipeline)
    ends, prompts, seeds = _ends(plan.layers), drawn.prompts, list(drawn.seeds)
    parts = [
        partial(_distances, drawn, [ends[n] for n in share]) for share in tuned.shares(len(ends))
    ]
    settings = {"embedding": [embed.name, embed.where], "prompts": prompts, "seeds": seeds}
    results, seconds = tuned.measure("generation", settings, len(ends), parts)
    head, tail, _ = _mean_costs(results, plan.layers)
    generated_for = [caption for subject in subjects for caption in _captions(subject, prompts)]
    return Selection(
        **_about(tuned),
        method="generation",
        embedding=embed.name,
        prompts=list(dict.fromkeys(generated_for)),
        seeds=seeds,
        draws=len(generated_for) * len(seeds),
        over="generated pictures",
        head=head.tolist(),
        tail=tail.tolist(),
        seconds=seconds,
    )


def select_by_loss(
    plan: Plan,
    subjects: Sequence[Subject],
    work: Path,
    *,
    frozen: bool = True,
    steps: int | None = None,
    pool: Pool | None = None,
) -> Selection:
    """Measure heads and tails by the training loss; no picture is generated.

    Args:
        plan: of the model; which blocks it skips does not matter.
        subjects: to tune to.
        work: folder for what is finished. With that of another selection, tuning is not repeated.
        frozen: measure "loss-frozen", else "loss-masked".
        steps: tuning steps for each subject; default ``plan.steps``.
        pool: a cluster that tunes and measures, see `TunedSubjects`.

    Raises:
        BadInput: no subject, or the model changed since the plan was made.
    """
    tuned = TunedSubjects(plan, subjects, work, steps or plan.steps, pool)
    return _select_frozen(tuned) if frozen else _select_masked(tuned)


def _pictures(
    tuned: TunedSubjects, captions: list[str], seeds: Sequence[int], masked: range
) -> list[Image.Image]:
    """Pictures of every caption and seed, the text masked from the image in some blocks."""
    family, pipeline, side = tuned.model.family, tuned.pipeline, tuned.plan.s_max
    with text_masked(family, pipeline.transformer, masked):
        by_caption = [family.sample(pipeline, caption, side, list(seeds)) for caption in captions]
    return [picture for pictures in by_caption for picture in pictures]


def _distances(
    drawn: Drawn, ends: list[range], tuned: TunedSubjects, subject: Subject, title: str
) -> np.ndarray:
    """D between pictures without a mask and with the text masked in each end, [1, ends]."""
    embed, captions = embedder(drawn.embedding, tuned.pipeline), _captions(subject, drawn.prompts)

    def vectors(masked: range) -> Tensor:
        return embed(_pictures(tuned, captions, drawn.seeds, masked))

    unmasked = vectors(range(0))
    distances = {range(0): 0.0}
    with bar(title, len({*ends, range(0)}) - 1) as advance:
        for blocks in ends:
            if blocks not in distances:  # once for all L blocks, which are both a head and a tail
                distances[blocks] = distance(unmasked, vectors(blocks))
                note = f"blocks {blocks.start} to {blocks.stop - 1}: {distances[blocks]:.4f}"
                advance(note=note)
    return np.array([[distances[blocks] for blocks in ends]])


def _select_masked(tuned: TunedSubjects) -> Selection:
    """Heads and tails by what masking the text adds to the loss."""
    layers = tuned.plan.layers
    settings, columns = {"levels": LEVELS}, len(_ends(layers))
    parts = [partial(_losses_of, losses_with_masked_text)]
    results, seconds = tuned.measure("loss-masked", settings, columns, parts)
    head, tail, _ = _mean_costs(results, layers)
    return Selection(
        **_about_losses(tuned),
        method="loss-masked",
        head=head.tolist(),
        tail=tail.tolist(),
        seconds=seconds,
    )


def _select_frozen(tuned: TunedSubjects) -> Selection:
    """Heads, tails and runs between trained blocks by how much of the tuning is lost."""
    layers = tuned.plan.layers
    runs = runs_to_measure(layers)
    splits = [[n for n in range(layers) if n not in skipped] for skipped in _ends(layers)]
    splits += [trained_blocks(layers, 0, 0, [run]) for run in runs]
    settings, parts = {"levels": LEVELS, "splits": splits}, by_splits(tuned, splits)
    results, seconds = tuned.measure("loss-frozen", settings, len(splits), parts)
    head, tail, alone = _mean_costs(results, layers)
    selection = Selection(
        **_about_losses(tuned),
        method="loss-frozen",
        head=head.tolist(),
        tail=tail.tolist(),
        seconds=seconds,
    )
    run_costs = dict(zip(runs, alone.tolist(), strict=True))
    between, more = best_inner_runs(tuned, selection, run_costs)
    tail_run, most = _run_tails(tuned)
    seconds += more + most
    update = {"between": between, "tail_run": tail_run, "seconds": seconds}
    return selection.model_copy(update=update)


def _run_tails(tuned: TunedSubjects) -> tuple[list[float], float]:
    """What tails that run without LoRA cost, by m = 0..L, and the seconds that it took."""
    columns, parts = tuned.plan.layers + 1, [partial(_losses_of, losses_of_run_tails)]
    results, seconds = tuned.measure("run-tails", {"levels": LEVELS}, columns, parts)
    losses = np.mean([rows.mean(axis=0) for rows in results], axis=0)
    return (losses - losses[0]).tolist(), seconds


def _losses_of(
    losses: Callable[..., np.ndarray], tuned: TunedSubjects, subject: Subject, title: str
) -> np.ndarray:
    """Losses of a subject by one of the functions of `edge_dit.select.replay`."""
    images, transformer = tuned.encode(subject.measured), tuned.pipeline.transformer
    return losses(tuned.model, transformer, images, title)


def _ends(layers: int) -> list[range]:
    """The first n blocks for n = 0..L, then the last m for m = 0..L: the columns of a result."""
    heads = [range(n) for n in range(layers + 1)]
    return heads + [range(layers - m, layers) for m in range(layers + 1)]


def _mean_costs(
    results: Sequence[np.ndarray], layers: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Costs by n, by m, and by further column: values over that with nothing skipped, means over
    subjects of means over rows.
    """
    costs = []
    for rows in results:
        head, tail, more = np.split(rows.mean(axis=0), [layers + 1, 2 * (layers + 1)])
        costs.append([head - head[0], tail - tail[0], more - head[0]])
    head, tail, more = (np.mean(parts, axis=0) for parts in zip(*costs, strict=True))
    return head, tail, more


def _captions(subject: Subject, most: int) -> list[str]:
    """The first different captions of a subject."""
    return list(dict.fromkeys(image.caption for image in subject.measured))[:most]


def _about(tuned: TunedSubjects) -> dict[str, Any]:
    """What every selection says of the model and its tuning."""
    return {
        "model_hash": tuned.plan.model_hash,
        "layers": tuned.plan.layers,
        "subjects": [subject.name for subject in tuned.subjects],
        "steps": tuned.steps,
    }


def _about_losses(tuned: TunedSubjects) -> dict[str, Any]:
    """What every selection by loss says of the model, its tuning and the measured images."""
    kinds = {"held-out" if subject.heldout else "training" for subject in tuned.subjects}
    return {
        **_about(tuned),
        "embedding": "",
        "prompts": [],
        "seeds": [],
        "draws": LEVELS * sum(len(subject.measured) for subject in tuned.subjects),
        "over": f"{' and '.join(sorted(kinds))} images",
    }
