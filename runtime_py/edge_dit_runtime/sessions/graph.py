"""The session of targets whose train step and optimizer are programs without state."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from edge_dit.contract.bundle import Bundle
from edge_dit.contract.names import ADAPTED, STEP
from edge_dit_runtime.sessions.state import take, take_step
from edge_dit_runtime.sessions.trainer import Tensors

Program = Callable[..., list[np.ndarray]]
"""Arrays in, arrays out, in the order the graph was exported with."""


class GraphSession:
    """A `Session` that keeps adapter and moments itself and passes them through two programs.

    Args:
        bundle: opened; training starts from its adapter.
        train: batch tensors, LoRA tensors -> loss, gradients.
        optimizer: lr, step, parameters, gradients, moments that are kept -> parameters, moments.
    """

    def __init__(self, bundle: Bundle, train: Program, optimizer: Program) -> None:
        self._train, self._optimizer = train, optimizer
        self._batch = bundle.manifest.names("batch")
        self._shapes = bundle.manifest.shapes("lora")
        self.lr = bundle.manifest.optimizer.lr
        self._step = 0
        self._gradients: Tensors = {}
        self._adapter = take(bundle.adapter(), self._shapes)
        self._moments = {
            moment: {name: np.zeros(shape, np.float32) for name, shape in self._shapes.items()}
            for moment in bundle.manifest.optimizer.moments
        }

    def backward(self, draw: Mapping[str, np.ndarray]) -> float:
        """Loss of one draw; keeps its gradients."""
        batch = (np.asarray(draw[name], np.float32) for name in self._batch)
        loss, *gradients = self._train(*batch, *self._adapter.values())
        self._gradients = self._named(gradients)
        return float(loss)

    def update(self) -> None:
        """One AdamW step with the gradients of the last `backward`."""
        tensors = (self._adapter, self._gradients, *self._moments.values())
        new = self._optimizer(
            np.array([self.lr], np.float32),
            np.array([self._step], np.float32),
            *(value for named in tensors for value in named.values()),
        )
        count = len(self._shapes)
        self._adapter = self._named(new[:count])
        self._moments = {
            moment: self._named(new[place * count : (place + 1) * count])
            for place, moment in enumerate(self._moments, 1)
        }
        self._step += 1
        self._gradients = {}  # as large as the adapter

    def _named(self, arrays: list[np.ndarray]) -> Tensors:
        return dict(zip(self._shapes, arrays, strict=True))

    def step(self, draw: Mapping[str, np.ndarray]) -> float:
        """`backward`, then `update`; the loss before the update."""
        loss = self.backward(draw)
        self.update()
        return loss

    def gradients(self) -> Tensors:
        """Copies of the last gradients by LoRA name, float32, before clipping."""
        return {name: value.copy() for name, value in self._gradients.items()}

    def set_gradients(self, gradients: Mapping[str, np.ndarray]) -> None:
        """Replace the gradients of the last `backward`."""
        self._gradients = {name: gradients[name] for name in self._shapes}

    def adapter(self) -> Tensors:
        """Copies of the LoRA tensors by name, float32."""
        return {name: value.copy() for name, value in self._adapter.items()}

    def load_adapter(self, adapter: Mapping[str, np.ndarray]) -> None:
        """Replace the LoRA tensors; moments and step count stay."""
        self._adapter = take(adapter, self._shapes)

    def state_dict(self) -> Tensors:
        """Copies of adapter and moments, float32, and "step", int64 [1]."""
        kinds = {ADAPTED: self._adapter, **self._moments}
        state = {k + n: value.copy() for k, named in kinds.items() for n, value in named.items()}
        return {**state, STEP: np.array([self._step], np.int64)}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore adapter, moments and step count from a `state_dict`."""
        step = take_step(state)
        adapter = take(state, self._shapes, ADAPTED)
        self._moments = {moment: take(state, self._shapes, moment) for moment in self._moments}
        self._adapter, self._step = adapter, step
