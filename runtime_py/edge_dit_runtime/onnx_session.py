"""Trains a bundle's plain ONNX step in any onnxruntime; numpy and onnxruntime only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_dit.adapter import read_adapter
from edge_dit.bundle import ADAPTER, Manifest
from edge_dit.errors import require
from edge_dit_runtime.session import Tensors
from edge_dit_runtime.state import MOMENTS, lora_shapes, take, take_step

FOLDER = "onnx"


class OnnxSession:
    """A `Session` over onnx/train_step.onnx and onnx/optimizer.onnx.

    Args:
        bundle: the bundle's folder.
        manifest: its manifest.
    """

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        self._train = _load(bundle / FOLDER / "train_step.onnx")
        self._optimizer = _load(bundle / FOLDER / "optimizer.onnx")
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
        outputs = ["loss", *(f"grad.{name}" for name in self._shapes)]
        batch = {name: np.asarray(draw[name], np.float32) for name in self._batch}
        loss, *gradients = self._train.run(outputs, {**batch, **self._state[""]})
        self._gradients = dict(zip(self._shapes, gradients, strict=True))
        return float(loss)

    def update(self) -> None:
        """See `Session.update`."""
        state = _prefixed(self._state)
        feeds = {
            "lr": self._lr,
            "step": np.array([self._step], np.float32),
            **state,
            **_prefixed({"grad.": self._gradients}),
        }
        outputs = [f"new.{name}" for name in state]
        new = iter(self._optimizer.run(outputs, feeds))
        self._state = {kind: {name: next(new) for name in self._shapes} for kind in self._state}
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
        state = {name: value.copy() for name, value in _prefixed(kinds).items()}
        return {**state, "step": np.array([self._step], np.int64)}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """See `Session.load_state_dict`."""
        self._step = take_step(state)
        self._state = {
            "": take(state, self._shapes, "adapter."),
            **{moment: take(state, self._shapes, moment) for moment in MOMENTS},
        }


def _prefixed(kinds: Mapping[str, Tensors]) -> Tensors:
    """{kind: {name: tensor}} -> {kind + name: tensor}."""
    return {
        kind + name: value for kind, tensors in kinds.items() for name, value in tensors.items()
    }


def _load(path: Path) -> Any:
    onnxruntime = require("onnxruntime", "the onnx target")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.use_deterministic_compute = True
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
