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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edge_dit.contract.adamw import learning_rate
from edge_dit.contract.adapter import Rows, with_random_b
from edge_dit.contract.bank import Bank
from edge_dit.contract.bundle import open_bundle
from edge_dit.contract.integrity import check_confined
from edge_dit.errors import BadInput
from edge_dit.pictures.sizes import PatchSizes
from edge_dit.store.tensors import TensorFile, write_tensors
from edge_dit_runtime.loop.measured import LOOP, measure_loop
from edge_dit_runtime.loop.parts import Parts
from edge_dit_runtime.probes import PROBES, VARIATIONS, sampler_inputs, varied
from edge_dit_runtime.session import open_sampler, open_session
from edge_dit_runtime.sessions.state import check_draw
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


Change = Callable[[Tensors], Tensors]
"""Makes the draw that is compared out of the stored one."""
NextPoint = Callable[[Change], Point]
"""The next point, for the adapter that the session has now."""


@dataclass(frozen=True)
class Task:
    """What a child process measures.

    Attributes:
        bundle, bank: folders.
        target, layout: one of the bundle's targets and layouts, or `LOOP` for the loop's parts.
        points: file written by `write_points`.
        steps: length of the trajectory.
        out: safetensors file to write, with the tensors of `measure` and `patches`.
    """

    bundle: str
    bank: str
    target: str
    layout: str
    points: str
    steps: int
    out: str

    def as_json(self) -> str:
        """The task as JSON, for the child's standard input."""
        return json.dumps(asdict(self))


def measure(
    session: Session,
    bank: Bank,
    adapter: Mapping[str, np.ndarray],
    steps: int,
    next_point: NextPoint,
) -> Tensors:
    """What verify compares, by name: "loss", "gradients.<name>", "inputs.<number>.loss" and
    ".<name>" (`varied`), "trajectory" (the loss of every step), "adapter.<name>" after it, and
    "optimizer.<probe>.<name of a state>" (`PROBES`). The session's state changes.

    Args:
        session: freshly opened.
        bank: of the bundle.
        adapter: the initial adapter.
        steps: length of the trajectory.
        next_point: the host searches for them here, a device replays them.
    """

    def backward(change: Change) -> Tensors:
        return measure_gradients(session, bank, adapter, change, next_point)

    measured = backward(dict)
    session.load_adapter(adapter)
    losses, rate = [], session.lr
    for number in range(steps):
        draw = _arrive(session, bank, dict, next_point)
        session.lr = learning_rate(number, steps, rate)
        losses.append(session.step(draw))
    measured["trajectory"] = np.array(losses)
    measured |= {f"adapter.{name}": value for name, value in session.adapter().items()}
    for number in range(VARIATIONS):
        found = backward(partial(varied, seed=number))
        measured |= {f"inputs.{number}.{name}": value for name, value in found.items()}
    for probe in PROBES:
        session.load_state_dict(probe.state(adapter))
        draw = _arrive(session, bank, probe.draw, next_point)
        session.lr = probe.lr
        session.step(draw)
        state = session.state_dict()
        measured |= {f"optimizer.{probe.name}.{name}": value for name, value in state.items()}
    session.lr = rate
    return measured


def measure_gradients(
    session: Session,
    bank: Bank,
    adapter: Mapping[str, np.ndarray],
    change: Change,
    next_point: NextPoint,
) -> Tensors:
    """Loss and gradients, named as in `measure`; the session's adapter changes.

    Args:
        session, bank, adapter: as of `measure`.
        change: of the stored draw.
        next_point: of which the next is taken.
    """
    session.load_adapter(with_random_b(adapter))
    draw = _arrive(session, bank, change, next_point)
    measured: Tensors = {"loss": np.array([session.backward(draw)])}
    named = session.gradients().items()
    return measured | {f"gradients.{name}": value for name, value in named}


def _arrive(session: Session, bank: Bank, change: Change, next_point: NextPoint) -> Tensors:
    """The draw of the next point; its rows are set."""
    point = next_point(change)
    _set_rows(session, point.rows)
    return change(bank[point.draw])


def _set_rows(session: Session, rows: Rows) -> None:
    if not rows:
        return
    adapter = session.adapter()
    for name, (numbers, values) in rows.items():
        adapter[name][numbers] = values
    session.load_adapter(adapter)


def patches(sampler: Callable[..., np.ndarray], plan: Mapping[str, Any]) -> Tensors:
    """Patches of random images of several sizes, by "patch.<number>".

    Args:
        sampler: as `edge_dit_runtime.session.open_sampler` opens it.
        plan: of the bundle's manifest.
    """
    rule = PatchSizes.model_validate(plan).crop_rule
    return {
        f"patch.{number}": np.asarray(sampler(*inputs))
        for number, inputs in enumerate(sampler_inputs(rule))
    }


def write_points(path: Path, points: Sequence[Point]) -> None:
    """Write points to a safetensors file."""
    tensors = {"draws": np.array([point.draw for point in points], np.int64)}
    for number, point in enumerate(points):
        for name, (numbers, values) in point.rows.items():
            tensors |= {f"{number}.numbers.{name}": numbers, f"{number}.values.{name}": values}
    write_tensors(path, tensors)


def read_points(path: Path) -> list[Point]:
    """The points of a file written by `write_points`."""
    tensors = TensorFile(path).read()
    points = [Point(int(draw), {}) for draw in tensors.pop("draws")]
    for key, numbers in tensors.items():
        number, kind, name = key.split(".", 2)
        if kind == "numbers":
            points[int(number)].rows[name] = (numbers, tensors[f"{number}.values.{name}"])
    return points


def replayed(points: Sequence[Point]) -> NextPoint:
    """The points of a list, one after the other."""
    following = iter(points)
    return lambda _: next(following)


def run(task: Task) -> None:
    """Measure one target and write the result.

    Raises:
        BadInput: bundle and bank do not fit, a file leads out of the bundle, or the runtime cannot
            load a graph.
    """
    bundle = open_bundle(Path(task.bundle))
    check_confined(bundle, task.target)
    if task.layout == LOOP:
        write_tensors(Path(task.out), measure_loop(Parts(bundle), bundle.adapter()))
        return
    bank = Bank(Path(task.bank), bundle.manifest.plan_hash)
    points = read_points(Path(task.points))
    for point in points:
        check_draw(bank[point.draw], bundle.manifest, bank.in_words(point.draw))
    next_point = replayed(points)
    session = open_session(bundle, task.target, task.layout)
    measured = measure(session, bank, bundle.adapter(), task.steps, next_point)
    del session
    measured |= patches(open_sampler(bundle, task.target), bundle.manifest.plan)
    write_tensors(Path(task.out), measured)


if __name__ == "__main__":
    try:
        run(Task(**json.load(sys.stdin)))
    except BadInput as error:  # the whole of it: the host shows what stands after the mark
        sys.exit(f"{MARK}{error}")
