"""Measures on the device's side what verify compares, in a process of its own.

    python -m edge_dit_runtime.measure < task.json

A bad program may abort its process, so `edge_dit.app.verify` starts one for every target and
layout. The host chooses where to measure (`Point`), does the same with PyTorch, and compares.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from edge_dit.contract.adapter import Rows, with_random_b
from edge_dit.contract.bank import Bank
from edge_dit.contract.bundle import open_bundle
from edge_dit.contract.integrity import check_confined
from edge_dit.store.tensors import TensorFile, write_tensors
from edge_dit_runtime.session import open_sampler, open_session
from edge_dit_runtime.sessions.trainer import Tensors, Trainer

PATCHES = ((0.0, 0.2, 0.9), (0.37, 0.6, 0.1), (0.83, 1.0, 0.0), (1.0, 0.5, 0.5))
"""(sigma, u, v) of the patches that are compared."""


@dataclass(frozen=True)
class Point:
    """One step of what parity compares.

    Attributes:
        draw: number of the draw in the bank.
        rows: rows of the adapter to replace before the step.
    """

    draw: int
    rows: Rows


@dataclass(frozen=True)
class Task:
    """What a child process measures.

    Attributes:
        bundle, bank: folders.
        target, layout: one of the bundle's targets and layouts.
        points: file written by `write_points`.
        out: safetensors file to write, with the tensors of `measure` and `patches`.
    """

    bundle: str
    bank: str
    target: str
    layout: str
    points: str
    out: str

    def as_json(self) -> str:
        """The task as JSON, for the child's standard input."""
        return json.dumps(asdict(self))


def measure(
    session: Trainer, bank: Bank, adapter: Mapping[str, np.ndarray], points: Sequence[Point]
) -> Tensors:
    """What verify compares, by name: "loss", "gradients.<name>", "trajectory" (the loss of every
    step) and "adapter.<name>". The session's adapter and optimizer state change.

    Args:
        session: freshly opened.
        bank: of the bundle.
        adapter: the initial adapter.
        points: first the one whose gradients are compared, then those of the trajectory.
    """
    first, *trajectory = points
    session.load_adapter(with_random_b(adapter))
    _set_rows(session, first.rows)
    measured: Tensors = {"loss": np.array([session.backward(bank[first.draw])])}
    measured |= {f"gradients.{name}": value for name, value in session.gradients().items()}
    session.load_adapter(adapter)
    losses = []
    for point in trajectory:
        _set_rows(session, point.rows)
        losses.append(session.step(bank[point.draw]))
    measured["trajectory"] = np.array(losses)
    return measured | {f"adapter.{name}": value for name, value in session.adapter().items()}


def _set_rows(session: Trainer, rows: Rows) -> None:
    if not rows:
        return
    adapter = session.adapter()
    for name, (numbers, values) in rows.items():
        adapter[name][numbers] = values
    session.load_adapter(adapter)


def patches(sampler: Callable[..., np.ndarray], s_max: int) -> Tensors:
    """Patches of a random image, by "patch.<number>".

    Args:
        sampler: as `edge_dit_runtime.session.open_sampler` opens it.
        s_max: of the plan, pixels.
    """
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (1, 3, s_max + 9, s_max + 5)).astype(np.float32)
    return {
        f"patch.{number}": np.asarray(
            sampler(image, np.array([sigma], np.float32), np.array([u, v], np.float32))
        )
        for number, (sigma, u, v) in enumerate(PATCHES)
    }


def write_points(path: Path, points: Sequence[Point]) -> None:
    """Write points to a safetensors file."""
    tensors = {"draws": np.array([point.draw for point in points], np.int64)}
    for step, point in enumerate(points):
        for name, (numbers, values) in point.rows.items():
            tensors |= {f"{step}.numbers.{name}": numbers, f"{step}.values.{name}": values}
    write_tensors(path, tensors)


def read_points(path: Path) -> list[Point]:
    """The points of a file written by `write_points`."""
    tensors = TensorFile(path).read()
    points = [Point(int(draw), {}) for draw in tensors.pop("draws")]
    for key, numbers in tensors.items():
        step, kind, name = key.split(".", 2)
        if kind == "numbers":
            points[int(step)].rows[name] = (numbers, tensors[f"{step}.values.{name}"])
    return points


def run(task: Task) -> None:
    """Measure one target and write the result.

    Raises:
        BadInput: bundle and bank do not fit, a file leads out of the bundle, or the runtime cannot
            load a graph.
    """
    bundle = open_bundle(Path(task.bundle))
    bank = Bank(Path(task.bank), bundle.manifest.plan_hash)
    check_confined(bundle, task.target)
    session = open_session(bundle, task.target, task.layout)
    measured = measure(session, bank, bundle.adapter(), read_points(Path(task.points)))
    del session
    measured |= patches(open_sampler(bundle, task.target), bundle.manifest.plan["s_max"])
    write_tensors(Path(task.out), measured)


if __name__ == "__main__":
    run(Task(**json.load(sys.stdin)))
