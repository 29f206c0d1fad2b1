"""Trains a bundle's onnxruntime-training artifacts; numpy and onnxruntime only.

``onnxruntime.training.api`` is a thin layer over ``onnxruntime.capi``, but importing it imports
torch and onnx. The layer below is used instead; it will not change, because 1.19.2 is the last
release.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np

from edge_dit.contract.bundle import Bundle
from edge_dit.contract.names import ADAPTED
from edge_dit.contract.targets import (
    CHECKPOINT,
    OPTIMIZER_MODEL,
    TRAINING_MODEL,
    OrtTrainingFacts,
)
from edge_dit.errors import missing_extra
from edge_dit_runtime.sessions import onnx
from edge_dit_runtime.sessions.mapped import MappedTensors
from edge_dit_runtime.sessions.ort import onnxruntime, session_options
from edge_dit_runtime.sessions.ort_checkpoint import views
from edge_dit_runtime.sessions.state import take, take_step
from edge_dit_runtime.sessions.trainer import Tensors

TARGET = "ort-training"


def open_session(bundle: Bundle, layout: str) -> OrtTrainingSession:
    """A session with the artifacts; there is one layout.

    Raises:
        BadInput: onnxruntime-training is not installed, or cannot load them.
    """
    return OrtTrainingSession(bundle)


def open_sampler(bundle: Bundle) -> Callable[..., np.ndarray]:
    """The patch sampler, an ONNX graph."""
    return onnx.open_sampler(bundle, TARGET)


class OrtTrainingSession:
    """A `Session` over the artifacts in ort-training/.

    Adapter, gradients, moments and step count live in onnxruntime's own state. Its interface shows
    no moments, but its checkpoint file holds them: `state_dict` reads such a file, and
    `load_state_dict` writes one. onnxruntime keeps a first moment even where beta1 is 0.

    Args:
        bundle: opened.
    """

    # Objects of onnxruntime, which has no type stubs.
    _optimizer: Any = None
    _module: Any = None
    _state: Any = None

    def __init__(self, bundle: Bundle) -> None:
        self._ort = onnxruntime("the ort-training target")
        self._c: Any = self._ort.capi._pybind_state
        if not hasattr(self._c, "CheckpointState"):
            raise missing_extra("onnxruntime.training", "the ort-training target")
        manifest = bundle.manifest
        self._folder = bundle.folder / TARGET
        self.lr = manifest.optimizer.lr
        self._kinds = (ADAPTED, *manifest.optimizer.moments)
        self._batch = manifest.shapes("batch")
        self._shapes = manifest.shapes("lora")
        facts = cast(OrtTrainingFacts, bundle.facts(TARGET))
        mapped = MappedTensors(*(self._folder / name for name in facts.files))
        self._frozen = [mapped[name] for name in facts.frozen]
        self._open(self._folder / CHECKPOINT)
        self.load_adapter(bundle.adapter())

    def _open(self, checkpoint: Path) -> None:
        """Load a checkpoint file, with the moments and step count in it if there are any."""
        self._close()
        options = session_options(self._ort)
        cpu = self._c.OrtDevice(self._c.OrtDevice.cpu(), self._c.OrtDevice.default_memory(), 0)
        self._state = self._c.load_checkpoint(str(checkpoint))
        self._module = self._c.Module(
            str(self._folder / TRAINING_MODEL), self._state, None, cpu, options
        )
        self._optimizer = self._c.Optimizer(
            str(self._folder / OPTIMIZER_MODEL), self._state, cpu, options
        )

    def _close(self) -> None:
        """Release optimizer and module before the state that they point into: otherwise they write
        to freed memory.
        """
        self._optimizer = None
        self._module = None
        self._state = None

    __del__ = _close

    def backward(self, draw: Mapping[str, np.ndarray]) -> float:
        """Loss of one draw; keeps its gradients."""
        arrays = [np.ascontiguousarray(draw[name], np.float32) for name in self._batch]
        inputs, outputs = self._c.OrtValueVector(), self._c.OrtValueVector()
        for array in [*arrays, *self._frozen]:  # borrowed, not copied
            inputs.push_back(self._value(array))
        self._module.lazy_reset_grad()  # or gradients would add up
        self._module.train_step_with_ort_values(inputs, outputs)
        return float(outputs[0].numpy())

    def _value(self, array: np.ndarray) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array)._ortvalue

    def update(self) -> None:
        """One AdamW step with the gradients of the last `backward`."""
        self._optimizer.set_learning_rate(self.lr)
        self._optimizer.optimizer_step()

    def step(self, draw: Mapping[str, np.ndarray]) -> float:
        """`backward`, then `update`; the loss before the update."""
        loss = self.backward(draw)
        self.update()
        return loss

    def gradients(self) -> Tensors:
        """Copies of the last gradients by LoRA name, float32, before clipping."""
        return {name: self._parameter(name).grad.numpy().copy() for name in self._shapes}

    def set_gradients(self, gradients: Mapping[str, np.ndarray]) -> None:
        """Replace the gradients of the last `backward`, where onnxruntime keeps them."""
        for name, shape in self._shapes.items():
            place = self._parameter(name).grad.data_ptr()
            kept = np.ctypeslib.as_array((ctypes.c_float * prod(shape)).from_address(place))
            kept[:] = gradients[name].reshape(-1)

    def _parameter(self, name: str) -> Any:
        return self._state.get_parameter(name)

    def adapter(self) -> Tensors:
        """Copies of the LoRA tensors by name, float32."""
        return {name: self._parameter(name).data.numpy().copy() for name in self._shapes}

    def load_adapter(self, adapter: Mapping[str, np.ndarray]) -> None:
        """Replace the LoRA tensors; moments and step count stay."""
        for name, value in take(adapter, self._shapes).items():
            self._state.copy_parameter_from(name, self._value(value))

    def state_dict(self) -> Tensors:
        """Copies of adapter and moments, float32, and "step", int64 [1]."""
        saved = views(self._checkpoint())
        step = saved.pop("step", np.zeros(1, np.int64)).copy()
        shapes = self._state_shapes()
        return {**{name: saved[name].reshape(shapes[name]).copy() for name in shapes}, "step": step}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore adapter, moments and step count from a `state_dict`."""
        values, step = take(state, self._state_shapes()), take_step(state)
        # After any update the checkpoint has a place for the step count.
        self.step({name: np.zeros(shape, np.float32) for name, shape in self._batch.items()})
        checkpoint = self._checkpoint()
        places = views(checkpoint)
        places["step"][:] = step
        for name, value in values.items():
            places[name][:] = value.reshape(-1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / CHECKPOINT
            path.write_bytes(checkpoint)
            self._open(path)

    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self._shapes.items()
        return {kind + name: shape for kind in self._kinds for name, shape in shapes}

    def _checkpoint(self) -> bytearray:
        """The bytes of onnxruntime's checkpoint of the current state, with its moments."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / CHECKPOINT
            self._c.save_checkpoint(self._state, str(path), True)
            return bytearray(path.read_bytes())
