"""Runs ONNX graphs on numpy arrays; `OnnxUpdate` writes a new state over the old one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edge_dit.contract.names import NEW
from edge_dit.errors import BadInput
from edge_dit_runtime.sessions.ort import onnxruntime, session_options


class OnnxProgram:
    """An ONNX graph on numpy arrays, in the order of the names given.

    Args:
        path: the .onnx file.
        inputs: names of the arguments.
        outputs: names of the results.
    """

    def __init__(self, path: Path, inputs: list[str], outputs: list[str]) -> None:
        ort = onnxruntime("the onnx target")
        options = session_options(ort)
        # Rearranged weights would be a second copy, in memory that cannot be evicted, for 3 % less
        # time (SANA-0.6B, 14 blocks, 256 tokens: 947 against 977 ms, 1.7 against 0.7 GiB).
        options.add_session_config_entry("session.disable_prepacking", "1")
        # A memory plan would take a block of its own, as large as the arena after the first step.
        options.enable_mem_pattern = False
        self.inputs, self._outputs = inputs, outputs
        try:
            self._session = ort.InferenceSession(
                path,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=[
                    # It would keep a value that is computed twice in memory in between.
                    "CommonSubexpressionElimination",
                    # It would keep a second, transposed copy of every int8 weight.
                    "ConstantFolding",
                ],
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
        """Run the graph on those of ``arrays`` that it reads; results by name.

        The results are copies: results left in onnxruntime's arena would fragment it.
        """
        results = self._session.run(self._outputs, {name: arrays[name] for name in self.inputs})
        return {name: value.copy() for name, value in zip(self._outputs, results, strict=True)}


class OnnxUpdate(OnnxProgram):
    """An ONNX graph that computes a new state and writes it over the old one in memory.

    A result "new.x" is written to the array given for "x". The graph reads all of an array before
    it writes the new one (`edge_dit_export.graph.optimizer.AdamWStep`).
    """

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Run the graph; the outputs are those of ``arrays`` that it wrote to."""
        given = dict(zip(self.inputs, arrays, strict=True))
        written = {name: given[name.removeprefix(NEW)] for name in self._outputs}
        binding = self._session.io_binding()
        for name, array in given.items():
            binding.bind_cpu_input(name, array)
        for name, array in written.items():
            place = array.ctypes.data
            binding.bind_output(name, "cpu", 0, np.float32, array.shape, place)
        self._session.run_with_iobinding(binding)
        return list(written.values())
