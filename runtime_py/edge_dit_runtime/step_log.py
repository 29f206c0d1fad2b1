"""What every step of a run did: loss.csv and steps.csv.

loss.csv has step, draw, sigma and loss, as every runtime writes it (docs/bundle.md, "Run").
steps.csv has what only this one knows of its steps: learning rate, gradient norm and seconds.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from itertools import takewhile
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edge_dit.errors import BadInput
from edge_dit.store.files import open_regular, write_atomic

LOSSES = "loss.csv"
STEPS = "steps.csv"
RECENT = 50
"""Number of last steps whose mean loss and time are shown."""
WINDOW = 200
"""Steps, not skipped, over which losses are averaged by noise level: the first and the last so
many; of a shorter run its halves.
"""
BINS = 8
"""Number of equal parts of (0, 1] in which losses are averaged by noise level."""
NAN = float("nan")
DAMAGED = (OSError, ValueError, OverflowError, csv.Error)
"""What reading a damaged table raises."""


class Step(NamedTuple):
    """One step.

    Attributes:
        draw: its number.
        sigma: the draw's noise level, in (0, 1].
        loss: before the update; nan if the step was skipped, because loss or gradients were not
            finite.
        lr: learning rate.
        grad_norm: Euclidean norm of the gradients of all LoRA tensors, before clipping; nan or
            infinite if the step was skipped for it.
        seconds: from asking for the draw to the end of the update.
    """

    draw: int
    sigma: float
    loss: float
    lr: float = NAN
    grad_norm: float = NAN
    seconds: float = NAN


class Level(NamedTuple):
    """Losses of a part of the noise levels.

    Attributes:
        low, high: the part, (low, high].
        loss: mean.
        steps: how many it is the mean of.
    """

    low: float
    high: float
    loss: float
    steps: int

    @property
    def middle(self) -> float:
        """Middle of the part."""
        return (self.low + self.high) / 2


@dataclass
class StepLog:
    """Every step done, a list for each field of `Step`. What an older version or another runtime
    did not write is nan.
    """

    draws: list[int] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.draws)

    def add(self, step: Step) -> None:
        """Add a step."""
        self.draws.append(int(step.draw))
        for column, value in zip(fields(self)[1:], step[1:], strict=True):
            getattr(self, column.name).append(float(value))

    def since(self, number: int) -> Iterator[Step]:
        """The steps from a number on."""
        return map(
            Step._make, zip(*(getattr(self, f.name)[number:] for f in fields(self)), strict=True)
        )

    @property
    def last(self) -> float:
        """Loss of the last step; nan if there is none."""
        return self.losses[-1] if self.losses else NAN

    @property
    def recent(self) -> float:
        """Mean of the last `RECENT` steps that were not skipped."""
        return _mean(self.losses[-RECENT:])

    @property
    def pace(self) -> float:
        """Mean seconds of the last `RECENT` steps; nan if they are not known."""
        return _mean(self.seconds[-RECENT:])

    @property
    def skipped(self) -> list[int]:
        """Numbers of the steps that were skipped."""
        return np.flatnonzero(~np.isfinite(self.losses)).tolist()

    @property
    def skipped_in_a_row(self) -> int:
        """How many of the last steps were skipped."""
        return sum(1 for _ in takewhile(lambda loss: not isfinite(loss), reversed(self.losses)))

    def by_level(self) -> tuple[list[Level], list[Level]]:
        """Mean loss by noise level of the first and of the last `WINDOW` steps."""
        steps = np.flatnonzero(np.isfinite(self.losses))
        window = max(1, min(WINDOW, len(steps) // 2))
        sigmas, losses = np.array(self.sigmas), np.array(self.losses)
        first, last = steps[:window], steps[-window:]
        return by_level(sigmas[first], losses[first]), by_level(sigmas[last], losses[last])

    def summary(self) -> dict[str, Any]:
        """The log in short, for JSON; None where nothing is known."""
        levels = self.by_level()[1]
        return {
            "done": len(self),
            "skipped": len(self.skipped),
            "loss": _known(self.recent),
            "loss_by_noise_level": [level._asdict() for level in levels],
            "grad_norm": _known(_mean(self.grad_norms[-RECENT:])),
            "lr": _known(self.lrs[-1] if self.lrs else NAN),
            "seconds_per_step": _known(self.pace),
        }

    def in_words(self) -> list[str]:
        """The summary as lines for people."""
        if not len(self):
            return ["no step was saved yet"]
        levels = [f"{x.loss:.3g} at sigma {x.low:g}-{x.high:g}" for x in self.by_level()[1]]
        skipped = f"; {len(self.skipped)} steps skipped" if self.skipped else ""
        return [
            f"loss {self.recent:.4g}, mean of the last {min(RECENT, len(self))} steps{skipped}",
            *([f"loss by noise level: {', '.join(levels)}"] if levels else []),
        ]

    def write_steps(self, folder: Path) -> None:
        """Write steps.csv.

        Raises:
            BadInput: the folder cannot be written.
        """
        rows = zip(range(len(self)), self.lrs, self.grad_norms, self.seconds, strict=True)
        write_atomic(folder / STEPS, _csv(("step", "lr", "grad_norm", "seconds"), rows))

    def write_losses(self, folder: Path) -> None:
        """Write loss.csv.

        Raises:
            BadInput: the folder cannot be written.
        """
        rows = zip(range(len(self)), self.draws, self.sigmas, self.losses, strict=True)
        write_atomic(folder / LOSSES, _csv(("step", "draw", "sigma", "loss"), rows))


def restored(
    folder: Path, draws: Sequence[int], sigmas: Sequence[float], losses: Sequence[float]
) -> StepLog:
    """The log of a run that goes on from its checkpoint.

    Args:
        folder: of the run. Its steps.csv may be lost, damaged, or of more or fewer steps: what it
            does not say of a step is nan.
        draws, sigmas, losses: of all steps done, by the checkpoint.
    """
    rows: list[tuple[float, ...]] = []
    with suppress(*DAMAGED):
        rows = _rows(folder / STEPS, ("lr", "grad_norm", "seconds"))
    rows = [*rows, *[(NAN, NAN, NAN)] * len(draws)][: len(draws)]
    log = StepLog()
    for draw, sigma, loss, row in zip(draws, sigmas, losses, rows, strict=True):
        log.add(Step(draw, sigma, loss, *row))
    return log


def read_log(folder: Path) -> StepLog:
    """The log of a run folder; empty before its first checkpoint.

    Raises:
        BadInput: loss.csv is damaged.
    """
    path = folder / LOSSES
    if not path.exists():
        return StepLog()
    try:
        rows = _rows(path, ("draw", "sigma", "loss"))
        draws = [int(draw) for draw, _, _ in rows]
        return restored(folder, draws, [row[1] for row in rows], [row[2] for row in rows])
    except DAMAGED as error:
        raise BadInput(
            path,
            found=f"not a table of losses ({error})",
            expected="columns step, draw, sigma and loss",
            remedy="edge-dit train --resume writes it again",
        ) from None


def by_level(sigmas: np.ndarray, losses: np.ndarray) -> list[Level]:
    """Mean loss in each of `BINS` parts of (0, 1] that holds a step.

    Args:
        sigmas: noise level of each step, in (0, 1].
        losses: of each step, finite.
    """
    edges = np.linspace(0, 1, BINS + 1).tolist()
    part = np.clip(np.ceil(np.asarray(sigmas) * BINS).astype(int) - 1, 0, BINS - 1)
    return [
        Level(edges[b], edges[b + 1], float(losses[part == b].mean()), int((part == b).sum()))
        for b in range(BINS)
        if (part == b).any()
    ]


def smoothed(values: Sequence[float]) -> tuple[np.ndarray, np.ndarray, int]:
    """Running mean of the finite values over a twentieth of them.

    Returns:
        numbers of the steps that it ends at, the means, and how many values each is the mean of.
    """
    steps = np.flatnonzero(np.isfinite(values))
    if not len(steps):
        return steps, np.zeros(0), 1
    window = max(1, len(steps) // 20)
    sums = np.cumsum(np.concatenate([[0.0], np.asarray(values, np.float64)[steps]]))
    return steps[window - 1 :], (sums[window:] - sums[:-window]) / window, window


def norm(gradients: Mapping[str, np.ndarray]) -> float:
    """Euclidean norm of all gradients together; finite exactly if every value is.

    Args:
        gradients: float32, by name. Their squares cannot overflow in float64.
    """
    squares = (np.square(g, dtype=np.float64).sum() for g in gradients.values())
    return float(np.sqrt(sum(squares)))


def _mean(values: Sequence[float]) -> float:
    """Mean of those that are finite; nan if none is."""
    finite = [value for value in values if isfinite(value)]
    return float(np.mean(finite)) if finite else NAN


def _known(value: float) -> float | None:
    return value if isfinite(value) else None


def _csv(header: Sequence[str], rows: Iterable[tuple[float, ...]]) -> str:
    """A table whose numbers have the fewest digits that give them back."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(map(repr, row) for row in rows)
    return text.getvalue()


def _rows(path: Path, names: Sequence[str]) -> list[tuple[float, ...]]:
    """Numbers of some columns of a table, a tuple a row.

    Raises:
        OSError: it cannot be read.
        ValueError, csv.Error: it is not such a table.
    """
    with io.TextIOWrapper(open_regular(path), "utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        if missing := set(names) - set(reader.fieldnames or []):
            raise ValueError(f"no column {', '.join(sorted(missing))}")
        return [tuple(float(row[name] or "") for name in names) for row in reader]
