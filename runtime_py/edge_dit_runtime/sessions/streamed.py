"""Trains a bundle's plain ONNX step block by block; numpy and onnxruntime only.

Frozen weights are views of the memory-mapped file, given back to the system after each block: what
stays in memory are the states at the blocks' borders, one block's activations, adapter and moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_dit.contract.bundle import Manifest
from edge_dit_runtime.sessions.graph import GraphSession
from edge_dit_runtime.sessions.mapped import MappedTensors
from edge_dit_runtime.sessions.onnx import FOLDER, OnnxProgram, onnx_optimizer
from edge_dit_runtime.sessions.ort import onnxruntime, share_arena
from edge_dit_runtime.sessions.trainer import Tensors

STATE = ("entry", "entry_text")


def streamed_session(bundle: Path, manifest: Manifest) -> GraphSession:
    """A session over onnx/block.<kind>.*.onnx, onnx/head.onnx and onnx/optimizer.onnx.

    Args:
        bundle: the bundle's folder.
        manifest: its manifest.

    Raises:
        BadInput: onnxruntime is not installed, or cannot load a graph.
    """
    share_arena(onnxruntime("the onnx target"), doubling=True)
    step = StreamedStep(bundle, manifest)
    return GraphSession(bundle, manifest, step, onnx_optimizer(bundle, manifest))


class StreamedStep:
    """Batch and LoRA tensors -> loss and gradients, one block after the other.

    Args:
        bundle: the bundle's folder.
        manifest: its manifest.
    """

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        facts = manifest.targets[FOLDER]
        self._batch, self._lora = manifest.names("batch"), manifest.names("lora")
        self._blocks: list[dict[str, Any]] = facts["streamed"]["blocks"]
        self._frozen = MappedTensors(bundle / FOLDER / facts["frozen"])
        self._programs = {
            file: OnnxProgram(bundle / FOLDER / file, names["inputs"], names["outputs"])
            for file, names in facts["streamed"]["graphs"].items()
        }

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Loss, then one gradient per LoRA tensor, in the manifest's order."""
        named = dict(zip([*self._batch, *self._lora], arrays, strict=True))
        borders = [{name: named[name] for name in STATE if name in named}]
        for block in self._blocks:
            for name, residual in block.get("residual", {}).items():
                borders[-1][name] = borders[-1][name] + named[residual]
            after = self._run(block, "forward", {**named, **borders[-1]})
            borders.append({name.removeprefix("new."): value for name, value in after.items()})
        head = self._programs["head.onnx"]
        result = head.named({**named, **borders.pop(), **self._frozen.pick(head.inputs)})
        self._frozen.release()
        loss, given = result["loss"], {"grad.entry": result["new.grad.entry"]}
        gradients: Tensors = {}
        for block in reversed(self._blocks):
            found = self._run(block, "backward", {**named, **borders.pop(), **given})
            given = {
                name.removeprefix("new."): value
                for name, value in found.items()
                if name.startswith("new.")
            }
            gradients |= {
                block["lora"][n.removeprefix("grad.")]: v
                for n, v in found.items()
                if n.startswith("grad.")
            }
        return [loss, *(gradients[name] for name in self._lora)]

    def _run(
        self, block: Mapping[str, Any], direction: str, named: Mapping[str, np.ndarray]
    ) -> Tensors:
        self._frozen.fetch(block["weights"].values())
        weights = {local: self._frozen[key] for local, key in block["weights"].items()}
        lora = {local: named[name] for local, name in block["lora"].items()}
        program = self._programs[f"block.{block['kind']}.{direction}.onnx"]
        found = program.named({**named, **weights, **lora})
        self._frozen.release()
        return found
