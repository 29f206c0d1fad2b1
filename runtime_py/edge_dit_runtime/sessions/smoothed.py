"""What a run smooths: gradients over several draws, the adapter over its updates.

    g      <- (g_1 + ... + g_K) / K                       of K draws, then one update
    d       = min(decay, (1 + n) / (10 + n))              n: updates done, with this one
    mean   <- mean + (1 - d) (adapter - mean)             after it

All in float32, tensor by tensor, by numpy: the same for every target. A small n keeps the average
near the adapter, as TensorFlow's ExponentialMovingAverage and diffusers' EMAModel have it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_dit.contract.names import AVERAGE, SUM, SUMMED
from edge_dit_runtime.sessions.state import take, take_step
from edge_dit_runtime.sessions.trainer import Session, Tensors


class SmoothedSession:
    """A `Session` around a target's. Its `update` changes nothing before it has the gradients of
    ``accumulate`` draws; its `adapter` is the average.

    Args:
        session: of a target, before its first step.
        accumulate: draws of an update (K); 1 for plain updates.
        ema: decay of the average, below 1; 0 for none: `adapter` is then what is trained.
    """

    def __init__(self, session: Session, accumulate: int, ema: float) -> None:
        self._session, self._accumulate, self._ema = session, accumulate, ema
        self.lr = session.lr
        self._sum: Tensors = {}
        self._summed = self._updates = 0
        self._average = session.adapter() if ema else {}

    def backward(self, draw: Mapping[str, np.ndarray]) -> float:
        """Loss of one draw; keeps its gradients."""
        return self._session.backward(draw)

    def gradients(self) -> Tensors:
        """Copies of the last gradients by LoRA name, float32: of one draw."""
        return self._session.gradients()

    def update(self) -> None:
        """Count the gradients of the last `backward`; if they are the last of a group, update."""
        if self._accumulate > 1:
            gradients = self._session.gradients()
            for name, earlier in self._sum.items():
                gradients[name] += earlier
            self._sum, self._summed = gradients, self._summed + 1
            if self._summed < self._accumulate:
                return
            for total in self._sum.values():
                total /= np.float32(self._accumulate)
            self._session.set_gradients(self._sum)
            self._sum, self._summed = {}, 0
        self._session.lr = self.lr
        self._session.update()
        self._updates += 1
        if self._ema:
            rest = np.float32(1 - average_decay(self._ema, self._updates))
            for name, value in self._session.adapter().items():
                self._average[name] += rest * (value - self._average[name])

    def step(self, draw: Mapping[str, np.ndarray]) -> float:
        """`backward`, then `update`; the loss before the update."""
        loss = self.backward(draw)
        self.update()
        return loss

    def set_gradients(self, gradients: Mapping[str, np.ndarray]) -> None:
        """Replace the gradients of the last `backward`."""
        self._session.set_gradients(gradients)

    def adapter(self) -> Tensors:
        """A copy of the average, or where there is none of the trained LoRA tensors, by name."""
        if not self._ema:
            return self._session.adapter()
        return {name: value.copy() for name, value in self._average.items()}

    def load_adapter(self, adapter: Mapping[str, np.ndarray]) -> None:
        """Replace the LoRA tensors and their average; the optimiser state is kept."""
        self._session.load_adapter(adapter)
        self._average = self._session.adapter() if self._ema else {}

    def state_dict(self) -> Tensors:
        """The session's; "ema.<name>" with an average; "sum.<name>" and "summed" (int64, [1]: its
        draws) within a group.
        """
        parts = {SUM: self._sum, AVERAGE: self._average}
        state = {k + n: value.copy() for k, named in parts.items() for n, value in named.items()}
        if self._summed:
            state[SUMMED] = np.array([self._summed], np.int64)
        return {**self._session.state_dict(), **state}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from a `state_dict`."""
        self._session.load_state_dict(state)
        shapes = {name: value.shape for name, value in self._session.adapter().items()}
        self._updates = take_step(state)
        self._average = take(state, shapes, AVERAGE) if self._ema else {}
        self._summed = take_step(state, SUMMED) if SUMMED in state else 0
        self._sum = take(state, shapes, SUM) if self._summed else {}


def average_decay(decay: float, updates: int) -> float:
    """Share of the average that an update leaves.

    Args:
        decay: largest such share.
        updates: done, with this one, from 1.
    """
    return min(decay, (1 + updates) / (10 + updates))


def smoothed(session: Session, accumulate: int, ema: float) -> Session:
    """The session itself where nothing is smoothed."""
    return SmoothedSession(session, accumulate, ema) if accumulate > 1 or ema else session
