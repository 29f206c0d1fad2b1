"""Where an export is compared with PyTorch: draws at which rounding does not decide gradients.

At some draws rounding decides PyTorch's own gradients, and a comparison would say nothing. If
possible a few rows of LoRA B are moved before the step (`edge_dit.reference.kinks`). Otherwise the
draw is left out, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from edge_dit.contract.adamw import learning_rate
from edge_dit.contract.adapter import with_random_b
from edge_dit.contract.bank import Bank
from edge_dit.contract.certificate import Draws
from edge_dit.contract.targets import TARGETS
from edge_dit.errors import CheckFailed
from edge_dit.reference.eager import EagerSession
from edge_dit.reference.kinks import nudge_from_kinks
from edge_dit_runtime.measure import Point, Points
from edge_dit_runtime.probes import PROBES, VARIATIONS, inflated, varied
from edge_dit_runtime.sessions.trainer import Session, Tensors
from edge_dit_runtime.training import draw_order

NUDGE = 2e-6
"""Relative size of the nudge of `is_well_posed`: just above what float32 rounding does."""
MOST_LEFT_OUT = 0.5
"""Largest share of the draws that may be left out. With more, a certificate would speak for the
minority of draws that are easy to compare."""


@dataclass(frozen=True)
class Chosen:
    """Where a target is compared, and which draws were left out on the way."""

    points: Points
    left_out: list[int]

    def draws(self) -> Draws:
        """The numbers of the draws as they are stored, for a certificate."""
        stored = [self.points.first, *self.points.trajectory]
        moved = [sum(len(numbers) for numbers, _ in point.rows.values()) for point in stored]
        return Draws([point.draw for point in stored], self.left_out, moved)


@dataclass
class _Search:
    """Takes draws in the order of a shuffled bank."""

    session: EagerSession
    bank: Bank
    most: int
    taken: int = 0
    left_out: list[int] = field(default_factory=list)

    def next(self, changed: Callable[[Tensors], Tensors] = dict) -> Point:
        """The next draw, ``changed``, at which gradients do not jump, for the session's adapter.

        Raises:
            CheckFailed: too many were left out.
        """
        while True:
            number = draw_order(self.taken, len(self.bank), 0)
            self.taken += 1
            draw = changed(self.bank[number])
            rows = nudge_from_kinks(self.session.subgraph, draw)
            if rows is not None or is_well_posed(self.session, draw):
                return Point(number, rows or {})
            self.left_out.append(number)
            if len(self.left_out) > self.most:
                raise _too_sensitive(self.session, self.taken, len(self.left_out))


def choose_points(
    session: EagerSession, bank: Bank, adapter: Mapping[str, np.ndarray], steps: int
) -> Chosen:
    """Points along PyTorch's own trajectory, and for changed inputs and made-up states, at which
    gradients do not jump.

    Args:
        session: PyTorch's; its adapter and optimizer state change.
        bank: of the bundle.
        adapter: the initial adapter.
        steps: length of the trajectory.

    Raises:
        CheckFailed: more than `MOST_LEFT_OUT` of the draws had to be left out.
    """
    random, rate = with_random_b(adapter), session.lr
    most = int((steps + 1) * MOST_LEFT_OUT / (1 - MOST_LEFT_OUT))
    search = _Search(session, bank, most)
    session.load_adapter(random)
    first = search.next()
    session.load_adapter(adapter)
    trajectory = []
    for number in range(steps):
        trajectory.append(search.next())
        session.lr = learning_rate(number, steps, rate)
        session.step(bank[trajectory[-1].draw])
    # These draws are changed, so that they say nothing of the bank's: counted on their own.
    made_up = _Search(session, bank, len(bank))
    changed = []
    for number in range(VARIATIONS):
        session.load_adapter(random)
        changed.append(made_up.next(lambda draw, seed=number: varied(draw, seed)))
    probes = []
    for probe in PROBES:
        session.load_state_dict(probe.state(adapter))
        probes.append(made_up.next(lambda draw, probe=probe: inflated(draw, probe)))
    session.lr = rate
    return Chosen(Points(first, changed, trajectory, probes), search.left_out)


def _too_sensitive(session: EagerSession, tried: int, left_out: int) -> CheckFailed:
    modules = " and ".join(session.subgraph.family.before_relu)
    return CheckFailed(
        f"{left_out} of {tried} draws cannot be compared: rounding decides PyTorch's "
        f"own gradients there. At most {MOST_LEFT_OUT:.0%} may be left out"
        + (f"; LoRA on {modules} would let verify move away from such places" if modules else "")
    )


def is_well_posed(session: Session, draw: Mapping[str, np.ndarray]) -> bool:
    """Whether a nudge of the entry state by `NUDGE` leaves the gradients within tolerance.

    If it does not, rounding decides them, and AdamW turns the difference into whole steps: such a
    draw says nothing about an export.
    """
    session.backward(draw)
    reference = session.gradients()
    nudge = NUDGE * np.random.default_rng(0).choice([-1.0, 1.0], draw["entry"].shape)
    for sign in (1, -1):
        entry = (draw["entry"] * (1 + sign * nudge)).astype(np.float32)
        session.backward({**draw, "entry": entry})
        for name, value in session.gradients().items():
            limit = TARGETS["onnx"].tolerances["gradients"] * np.abs(reference[name]).max()
            if np.abs(value - reference[name]).max() > limit:
                return False
    return True
