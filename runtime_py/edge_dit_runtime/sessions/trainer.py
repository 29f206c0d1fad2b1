"""What a loaded bundle can do, whatever its target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

Tensors = dict[str, np.ndarray]


class Trainer(Protocol):
    """A train step with its adapter; what parity compares.

    Tensors are float32 numpy arrays; LoRA tensors go by their diffusers names, as in
    adapter.safetensors.
    """

    def backward(self, draw: Mapping[str, np.ndarray]) -> float:
        """Loss of one draw; keeps its gradients. ``draw`` holds the batch tensors of the manifest
        by name. Does not change the adapter.
        """
        ...

    def update(self) -> None:
        """One AdamW step (`edge_dit.contract.adamw`) with the gradients of the last `backward`."""
        ...

    def step(self, draw: Mapping[str, np.ndarray]) -> float:
        """`backward` then `update`; the loss before the update."""
        ...

    def gradients(self) -> Tensors:
        """Gradients of the last `backward`, before clipping, by LoRA name. Valid until `update`."""
        ...

    def adapter(self) -> Tensors:
        """A copy of the LoRA tensors."""
        ...

    def load_adapter(self, adapter: Mapping[str, np.ndarray]) -> None:
        """Replace the LoRA tensors; the optimiser state is kept."""
        ...


class Session(Trainer, Protocol):
    """A loaded bundle: a trainer whose learning rate can be set, and whose state can be kept."""

    lr: float
    """Learning rate of the updates to come; at first the manifest's."""

    def state_dict(self) -> Tensors:
        """Everything a resumed run needs to go on bit for bit: "adapter.<name>", "exp_avg.<name>",
        "exp_avg_sq.<name>" and "step" (int64, [1]: updates done).
        """
        ...

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from a `state_dict`."""
        ...
