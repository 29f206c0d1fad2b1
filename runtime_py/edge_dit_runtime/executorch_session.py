"""Trains a bundle's ExecuTorch step. The one session that needs torch: ExecuTorch's Python runtime
takes torch tensors (any torch of its release; the programs themselves need none on a device).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_dit.adapter import read_adapter
from edge_dit.bundle import ADAPTER, Manifest
from edge_dit.errors import BadInput, require
from edge_dit_runtime.session import Tensors
from edge_dit_runtime.state import MOMENTS, lora_shapes, take, take_step

FOLDER = "executorch"


class ExecuTorchSession:
    """A `Session` over executorch/train.pte and executorch/optimizer.pte.

    Args:
        bundle: the bundle's folder.
        manifest: its manifest.
    """

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        self._train = Program(bundle / FOLDER / "train.pte")
        self._optimizer = Program(bundle / FOLDER / "optimizer.pte")
        self._batch = manifest.names("batch")
        self._shapes = lora_shapes(manifest)
        self._lr = np.array([manifest.optimizer.lr], np.float32)
        self._gradients: Tensors = {}
        self._step = 0
        zeros = {name: np.zeros(shape, np.float32) for name, shape in self._shapes.items()}
        self._state: dict[str, Tensors] = {
            "": take(read_adapter(bundle / ADAPTER)[0], self._shapes),
            **{moment: dict(zeros) for moment in MOMENTS},
        }
        """LoRA tensors under "", moments under "exp_avg." and "exp_avg_sq."; each by LoRA name."""

    def backward(self, draw: Mapping[str, np.ndarray]) -> float:
        """See `Session.backward`."""
        batch = [np.asarray(draw[name], np.float32) for name in self._batch]
        loss, *gradients = self._train(*batch, *self._state[""].values())
        self._gradients = dict(zip(self._shapes, gradients, strict=True))
        return float(loss)

    def update(self) -> None:
        """See `Session.update`."""
        parameters, mean, square = (self._state[kind].values() for kind in ("", *MOMENTS))
        step = np.array([self._step], np.float32)
        gradients = self._gradients.values()
        new = iter(self._optimizer(self._lr, step, *parameters, *gradients, *mean, *square))
        self._state = {kind: {n: next(new) for n in self._shapes} for kind in ("", *MOMENTS)}
        self._step += 1

    def step(self, draw: Mapping[str, np.ndarray]) -> float:
        """See `Session.step`."""
        loss = self.backward(draw)
        self.update()
        return loss

    def gradients(self) -> Tensors:
        """See `Session.gradients`."""
        return {name: value.copy() for name, value in self._gradients.items()}

    def adapter(self) -> Tensors:
        """See `Session.adapter`."""
        return {name: value.copy() for name, value in self._state[""].items()}

    def load_adapter(self, adapter: Mapping[str, np.ndarray]) -> None:
        """See `Session.load_adapter`."""
        self._state[""] = take(adapter, self._shapes)

    def state_dict(self) -> Tensors:
        """See `Session.state_dict`."""
        kinds = {"adapter.": self._state[""], **{m: self._state[m] for m in MOMENTS}}
        state = {
            k + n: value.copy() for k, tensors in kinds.items() for n, value in tensors.items()
        }
        return {**state, "step": np.array([self._step], np.int64)}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """See `Session.load_state_dict`."""
        self._step = take_step(state)
        self._state = {
            "": take(state, self._shapes, "adapter."),
            **{moment: take(state, self._shapes, moment) for moment in MOMENTS},
        }


class Program:
    """The "forward" of a .pte file on numpy arrays.

    Args:
        path: the file.

    Raises:
        BadInput: executorch is not installed, or cannot load the file.
    """

    def __init__(self, path: Path) -> None:
        runtime = _runtime()
        try:
            # The runtime's Program owns what its methods read: it must outlive them.
            self._program = runtime.load_program(path)
            self._method: Any = self._program.load_method("forward")
        except (OSError, RuntimeError) as error:
            raise BadInput(
                path,
                found=f"ExecuTorch cannot load it: {error}",
                expected="a program of ExecuTorch 1.5",
                remedy="export the bundle again",
            ) from None

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Run it; inputs as the program was exported with, outputs as new arrays."""
        import torch

        inputs = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        return [output.numpy().copy() for output in self._method.execute(inputs)]


def _runtime() -> Any:
    require("executorch", "the executorch target")
    with warnings.catch_warnings():
        # Its Python bindings say so of themselves when they are first imported.
        warnings.filterwarnings("ignore", "This API is experimental")
        from executorch.runtime import Runtime

        return Runtime.get()
