"""Measures on the device's side what verify compares, in a process of its own.

    python -m edge_dit_runtime.measure < task.json

A bad program may abort its process, so `edge_dit.app.verify` starts one for every target and
layout. The host chooses where to measure (`Point`), does the same with PyTorch, and compares.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from edge_dit.contract.adamw import learning_rate
from edge_dit.contract.adapter import Rows, with_random_b
from edge_dit.contract.bank import Bank
from edge_dit.contract.bundle import open_bundle
from edge_dit.contract.integrity import check_confined
from edge_dit.errors import BadInput
from edge_dit.store.tensors import TensorFile, write_tensors
from edge_dit_runtime.probes import PROBES, inflated, sampler_inputs, varied
from edge_dit_runtime.session import open_sampler, open_session
from edge_dit_runtime.sessions.trainer import Session, Tensors

MARK = "edge-dit: "
"""Stands before a message for people on the child's standard error."""


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
class Points:
    """All that is compared.

    Attributes:
        first: where the gradients are compared.
        varied: the draws that are changed in every input.
        trajectory: the steps.
        probes: the draw of each of `PROBES`; those after the last one are left out.
    """

    first: Point
    varied: list[Point]
    trajectory: list[Point]
    probes: list[Point]

    def all(self) -> list[Point]:
        """Every point, in the order in which it is measured."""
        return [self.first, *self.varied, *self.trajectory, *self.probes]


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
    session: Session, bank: Bank, adapter: Mapping[str, np.ndarray], points: Points
) -> Tensors:
    """What verify compares, by name: "loss", "gradients.<name>", "inputs.<number>.loss" and
    ".<name>" (`varied`), "trajectory" (the loss of every step), "adapter.<name>" after it, and
    "optimizer.<probe>.<name of a state>" (`PROBES`). The session's state changes.

    Args:
        session: freshly opened.
        bank: of the bundle.
        adapter: the initial adapter.
        points: where.
    """
    random = with_random_b(adapter)
    measured = _backward(session, bank[points.first.draw], random, points.first)
    for number, point in enumerate(points.varied):
        draw = varied(bank[point.draw], number)
        found = _backward(session, draw, random, point)
        measured |= {f"inputs.{number}.{name}": value for name, value in found.items()}
    session.load_adapter(adapter)
    losses, rate = [], session.lr
    for number, point in enumerate(points.trajectory):
        _set_rows(session, point.rows)
        session.lr = learning_rate(number, len(points.trajectory), rate)
        losses.append(session.step(bank[point.draw]))
    measured["trajectory"] = np.array(losses)
    measured |= {f"adapter.{name}": value for name, value in session.adapter().items()}
    for probe, point in zip(PROBES, points.probes, strict=False):
        session.load_state_dict(probe.state(adapter))
        _set_rows(session, point.rows)
        session.lr = probe.lr
        session.step(inflated(bank[point.draw], probe))
        state = session.state_dict()
        measured |= {f"optimizer.{probe.name}.{name}": value for name, value in state.items()}
    session.lr = rate
    return measured


def _backward(
    session: Session, draw: Mapping[str, np.ndarray], adapter: Mapping[str, np.ndarray], at: Point
) -> Tensors:
    session.load_adapter(adapter)
    _set_rows(session, at.rows)
    measured: Tensors = {"loss": np.array([session.backward(draw)])}
    return measured | {f"gradients.{name}": value for name, value in session.gradients().items()}


def _set_rows(session: Session, rows: Rows) -> None:
    if not rows:
        return
    adapter = session.adapter()
    for name, (numbers, values) in rows.items():
        adapter[name][numbers] = values
    session.load_adapter(adapter)


def patches(sampler: Callable[..., np.ndarray], s_max: int) -> Tensors:
    """Patches of random images of several sizes, by "patch.<number>".

    Args:
        sampler: as `edge_dit_runtime.session.open_sampler` opens it.
        s_max: of the plan, pixels.
    """
    return {
        f"patch.{number}": np.asarray(sampler(*inputs))
        for number, inputs in enumerate(sampler_inputs(s_max))
    }


def write_points(path: Path, points: Points) -> None:
    """Write points to a safetensors file."""
    counts = [len(points.varied), len(points.trajectory), len(points.probes)]
    every = points.all()
    tensors = {
        "counts": np.array(counts, np.int64),
        "draws": np.array([point.draw for point in every], np.int64),
    }
    for number, point in enumerate(every):
        for name, (numbers, values) in point.rows.items():
            tensors |= {f"{number}.numbers.{name}": numbers, f"{number}.values.{name}": values}
    write_tensors(path, tensors)


def read_points(path: Path) -> Points:
    """The points of a file written by `write_points`."""
    tensors = TensorFile(path).read()
    changed, steps, _ = tensors.pop("counts").tolist()
    every = [Point(int(draw), {}) for draw in tensors.pop("draws")]
    for key, numbers in tensors.items():
        step, kind, name = key.split(".", 2)
        if kind == "numbers":
            every[int(step)].rows[name] = (numbers, tensors[f"{step}.values.{name}"])
    first, rest = every[0], every[1:]
    return Points(first, rest[:changed], rest[changed : changed + steps], rest[changed + steps :])


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
    try:
        run(Task(**json.load(sys.stdin)))
    except BadInput as error:  # the whole of it: the host shows what stands after the mark
        sys.exit(f"{MARK}{error}")
