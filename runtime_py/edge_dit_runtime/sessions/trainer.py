"""What every target's session can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

Tensors = dict[str, np.ndarray]


class Session(Protocol):
    """A train step, its adapter, its learning rate, and a state that can be saved. PyTorch's
    reference has it too, so that verify can compare.

    Tensors are float32 numpy arrays; LoRA tensors go by their diffusers names, as in
    adapter.safetensors.
    """

    lr: float
    """Learning rate of the next updates; at first the manifest's."""

    def backward(self, draw: Mapping[str, np.ndarray]) -> float:
        """Loss of one draw; keeps its gradients, and does not change the adapter.

        Args:
            draw: the batch tensors of the manifest by name, float32.
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

    def state_dict(self) -> Tensors:
        """Everything a resumed run needs to give the same bits: "adapter.<name>", "exp_avg.<name>",
        "exp_avg_sq.<name>" and "step" (int64, [1]: updates done).
        """
        ...

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from a `state_dict`."""
        ...
