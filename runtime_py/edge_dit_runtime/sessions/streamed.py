"""Trains a bundle's plain ONNX step block by block; numpy and onnxruntime only.

Frozen weights are views of the memory-mapped file. While a block computes, those of the next one
are read ahead; after it, its pages are given back to the system. Memory holds the states between
blocks, one block's activations, the adapter and its moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from edge_dit.contract.bundle import Manifest
from edge_dit.contract.names import ENTRY, GRAD, LOSS, NEW, STATE
from edge_dit.contract.targets import HEAD, StreamedBlock, StreamedFacts, block_file
from edge_dit_runtime.sessions.mapped import MappedTensors
from edge_dit_runtime.sessions.onnx_program import OnnxProgram
from edge_dit_runtime.sessions.trainer import Tensors


class StreamedStep:
    """Computes loss and gradients from batch and LoRA tensors, one block after the other.

    Args:
        manifest: of the bundle.
        facts: the graphs and the blocks.
        folder: of the graphs.
        frozen: the frozen weights.
    """

    def __init__(
        self, manifest: Manifest, facts: StreamedFacts, folder: Path, frozen: MappedTensors
    ) -> None:
        self._batch, self._lora = manifest.names("batch"), manifest.names("lora")
        self._blocks, self._forward_only = facts.blocks, facts.forward_only
        self._frozen = frozen
        self._programs = {
            file: OnnxProgram(folder / file, names.inputs, names.outputs)
            for file, names in facts.graphs.items()
        }

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Loss, then one gradient per LoRA tensor, in the manifest's order."""
        named = dict(zip([*self._batch, *self._lora], arrays, strict=True))
        self._ahead = self._in_order()
        borders = [{name: named[name] for name in STATE if name in named}]
        for block in self._blocks:
            for name, residual in block.residual.items():
                borders[-1][name] = borders[-1][name] + named[residual]
            after = self._run(block, "forward", {**named, **borders[-1]})
            borders.append(_states(after))
        last = borders.pop()
        for block in self._forward_only:
            last = _states(self._run(block, "forward", {**named, **last}))
        head = self._programs[HEAD]
        result = head.named({**named, **last, **self._frozen.pick(head.inputs)})
        self._frozen.release(head.inputs)
        loss, given = result[LOSS], {GRAD + ENTRY: result[NEW + GRAD + ENTRY]}
        gradients: Tensors = {}
        for block in reversed(self._blocks):
            results = self._run(block, "backward", {**named, **borders.pop(), **given})
            given = {
                name.removeprefix(NEW): value
                for name, value in results.items()
                if name.startswith(NEW)
            }
            gradients |= {
                block.lora[n.removeprefix(GRAD)]: v
                for n, v in results.items()
                if n.startswith(GRAD)
            }
        return [loss, *(gradients[name] for name in self._lora)]

    def _run(
        self, block: StreamedBlock, direction: str, named: Mapping[str, np.ndarray]
    ) -> Tensors:
        keys = list(block.weights.values())
        self._frozen.fetch(keys)  # nothing is left to do where it was fetched ahead
        following = next(self._ahead, None)
        if following is not None and following is not block:
            self._frozen.fetch_ahead(following.weights.values())
        weights = {local: self._frozen[key] for local, key in block.weights.items()}
        lora = {local: named[name] for local, name in block.lora.items()}
        cond = {local: named[name] for local, name in block.cond.items()}
        program = self._programs[block_file(block.kind, direction)]
        results = program.named({**named, **cond, **weights, **lora})
        if following is not block:
            self._frozen.release(keys)
        return results

    def _in_order(self) -> Iterator[StreamedBlock]:
        """The blocks of a step after the first one, as they run."""
        yield from [*self._blocks, *self._forward_only][1:]
        yield from reversed(self._blocks)


def _states(after: Tensors) -> Tensors:
    """The states that a forward graph returned, by `STATE`."""
    return {name.removeprefix(NEW): value for name, value in after.items()}
