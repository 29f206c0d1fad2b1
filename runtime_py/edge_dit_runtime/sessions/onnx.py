"""Trains a bundle's plain ONNX step in any onnxruntime; numpy and onnxruntime only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edge_dit.contract.bundle import Manifest
from edge_dit.errors import BadInput
from edge_dit_runtime.sessions.graph import GraphSession
from edge_dit_runtime.sessions.ort import onnxruntime, share_arena

FOLDER = "onnx"
OPTIMIZER = "optimizer.onnx"


def onnx_session(bundle: Path, manifest: Manifest, step: str = "train_step.onnx") -> GraphSession:
    """A session over a train step and onnx/optimizer.onnx.

    Args:
        bundle: the bundle's folder.
        manifest: its manifest.
        step: file of the train step in onnx/.

    Raises:
        BadInput: onnxruntime is not installed, or cannot load a graph.
    """
    graphs = manifest.targets[FOLDER]["graphs"]
    train = OnnxProgram(bundle / FOLDER / step, graphs[step]["inputs"], graphs[step]["outputs"])
    return GraphSession(bundle, manifest, train, onnx_optimizer(bundle, manifest))


def onnx_optimizer(bundle: Path, manifest: Manifest) -> OnnxUpdate:
    """onnx/optimizer.onnx of a bundle.

    Raises:
        BadInput: onnxruntime is not installed, or cannot load it.
    """
    names = manifest.targets[FOLDER]["graphs"][OPTIMIZER]
    return OnnxUpdate(bundle / FOLDER / OPTIMIZER, names["inputs"], names["outputs"])


class OnnxProgram:
    """An ONNX graph on numpy arrays, in the order of the names given.

    Args:
        path: the file.
        inputs: names of the arguments.
        outputs: names of the results.
    """

    def __init__(self, path: Path, inputs: list[str], outputs: list[str]) -> None:
        ort = onnxruntime("the onnx target")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.use_deterministic_compute = True
        # Rearranged weights would be a second copy, in memory that cannot be evicted, for 3 % less
        # time (SANA-0.6B, 14 blocks, 256 tokens: 947 against 977 ms, 1.7 against 0.7 GiB).
        options.add_session_config_entry("session.disable_prepacking", "1")
        share_arena(ort)
        options.add_session_config_entry("session.use_env_allocators", "1")
        # A planned block would lie beside what the arena took for the first step: as much again.
        options.enable_mem_pattern = False
        self.inputs, self._outputs = inputs, outputs
        try:
            self._session = ort.InferenceSession(
                path,
                options,
                providers=["CPUExecutionProvider"],
                # Would keep what is computed twice alive between the two.
                disabled_optimizers=["CommonSubexpressionElimination"],
            )
        except Exception as error:  # onnxruntime's errors have no common base but this
            raise BadInput(
                path,
                found=f"onnxruntime cannot load it: {error}",
                expected="a graph as exported",
                remedy="export the bundle again",
            ) from None

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Run the graph; outputs are new arrays."""
        return self._session.run(self._outputs, dict(zip(self.inputs, arrays, strict=True)))

    def named(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph on what it reads of ``arrays``; results by name.

        They are copies: results in onnxruntime's arena would lie between what the next graph needs.
        """
        found = self._session.run(self._outputs, {name: arrays[name] for name in self.inputs})
        return {name: value.copy() for name, value in zip(self._outputs, found, strict=True)}


class OnnxUpdate(OnnxProgram):
    """An ONNX graph of a new state from an old one, which it takes the place of in memory.

    A result "new.x" is written to the array given for "x". The graph reads all of an array before
    it writes the new one (`edge_dit_export.graph.optimizer.AdamWStep`).
    """

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Run the graph; outputs are those of ``arrays`` that were written to."""
        given = dict(zip(self.inputs, arrays, strict=True))
        written = {name: given[name.removeprefix("new.")] for name in self._outputs}
        binding = self._session.io_binding()
        for name, array in given.items():
            binding.bind_cpu_input(name, array)
        for name, array in written.items():
            place = array.ctypes.data
            binding.bind_output(name, "cpu", 0, np.float32, array.shape, place)
        self._session.run_with_iobinding(binding)
        return list(written.values())
