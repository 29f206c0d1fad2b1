"""What every target's session can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from edge_dit.contract.bank import Draw

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

    def set_gradients(self, gradients: Mapping[str, np.ndarray]) -> None:
        """Replace the gradients of the last `backward`.

        Args:
            gradients: by LoRA name, float32; they belong to the session from now on.
        """
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


class Draws(Protocol):
    """What a run trains on: a bank, or pictures that draws are made of just in time.

    Attributes:
        name: of its folder.
        identity: SHA-256 that tells it from any other.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def identity(self) -> str: ...  # noqa: D102

    def number(self, step: int, seed: int) -> int:
        """Number of the draw that a step trains on.

        Args:
            step: from 0.
            seed: the plan's.
        """
        ...

    def draw(self, number: int) -> Draw:
        """What a draw is made of."""
        ...

    def __getitem__(self, number: int) -> Tensors:
        """The batch tensors of a draw, float32, by the names that exported graphs use."""
        ...

    def in_words(self, number: int) -> str:
        """A draw for a message."""
        ...
