"""Trains a bundle's plain ONNX step in any onnxruntime; numpy and onnxruntime only."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_dit.bundle import Manifest
from edge_dit.errors import BadInput, require
from edge_dit_runtime.graph_session import GraphSession

FOLDER = "onnx"


def onnx_session(bundle: Path, manifest: Manifest) -> GraphSession:
    """A session over onnx/train_step.onnx and onnx/optimizer.onnx.

    Args:
        bundle: the bundle's folder.
        manifest: its manifest.

    Raises:
        BadInput: onnxruntime is not installed, or cannot load a graph.
    """
    graphs = manifest.targets[FOLDER]["graphs"]
    programs = [
        OnnxProgram(bundle / FOLDER / name, graphs[name]["inputs"], graphs[name]["outputs"])
        for name in ("train_step.onnx", "optimizer.onnx")
    ]
    return GraphSession(bundle, manifest, *programs)


class OnnxProgram:
    """An ONNX graph on numpy arrays, in the order of the names given.

    Args:
        path: the file.
        inputs: names of the arguments.
        outputs: names of the results.
    """

    def __init__(self, path: Path, inputs: list[str], outputs: list[str]) -> None:
        onnxruntime = require("onnxruntime", "the onnx target")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.use_deterministic_compute = True
        self._inputs, self._outputs = inputs, outputs
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
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
        return self._session.run(self._outputs, dict(zip(self._inputs, arrays, strict=True)))
