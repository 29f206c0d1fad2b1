"""Exports the plain ONNX step block by block, so that memory hardly grows with depth.

    block.<kind>.forward.onnx    state, conditioning, weights, LoRA -> state after the block
    block.<kind>.backward.onnx   the same and the gradient of that state
                                 -> gradient of the state before, one gradient per LoRA tensor
    head.onnx                    last state, target, weights -> loss, its gradient; where the tail
                                 is stored, its residual is read too

Blocks of the tail, where they run, are blocks without LoRA. If the gradient does not go through
them ("fresh"), there is no backward graph of their kinds, and the head's gradient is that of the
state after the last trained block.

Blocks of one kind share their graphs; weights are inputs, so the runtime can hand in views of the
memory-mapped file that holds all of them once. Between the passes only the states between blocks
are kept; the backward graph computes its block again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from edge_dit.contract.names import (
    COND,
    ENTRY,
    GRAD,
    LOSS,
    NEW,
    STATE,
    TAIL_RESIDUAL,
    TARGET,
    WEIGHT,
    WEIGHT_MASK,
    residual_names,
)
from edge_dit.contract.targets import DIRECTIONS, HEAD, WIDE, block_file
from edge_dit.models.subgraph import TrainableSubgraph, lora_name
from edge_dit_export import passes
from edge_dit_export.graph.blocks import Block, Head
from edge_dit_export.graph.trace import trace
from edge_dit_export.passes_onnx.products_in_int8 import share_quantised
from edge_dit_export.passes_onnx.transposes_to_gemm import transposes_to_gemm
from edge_dit_export.passes_onnx.weights_in_fewer_bytes import weights_in_fewer_bytes
from edge_dit_export.targets.frozen import FrozenStore
from edge_dit_export.targets.onnx_model import INLINE_BYTES, graph_names, onnx_model


def export_streamed(
    subgraph: TrainableSubgraph, batch: dict[str, Tensor], store: FrozenStore, directory: Path
) -> dict[str, Any]:
    """Write the graphs into ``directory``, an existing folder.

    Args:
        subgraph: float32, LoRA in place.
        batch: one draw, as `TrainableSubgraph.forward` takes it; only the shapes matter.
        store: the frozen weights of the bundle; holds `frozen_tensors` of the sub-graph.
        directory: of the onnx target.

    Returns:
        "graphs", "blocks" and "forward_only", the fields of
        `edge_dit.contract.targets.StreamedFacts`.
    """
    kinds: dict[tuple[Any, ...], str] = {}
    graphs: dict[str, Any] = {}
    entries = []
    back = subgraph.differentiated()
    for name in (*subgraph.order, *subgraph.after):
        block = Block(subgraph, name)
        key = block.kind()
        if key not in kinds:
            kinds[key] = new_kind(name, list(kinds.values()))
        for direction in DIRECTIONS if name in back else DIRECTIONS[:1]:
            file = block_file(kinds[key], direction)
            if file not in graphs:
                graphs[file] = _export_block(block, batch, store, directory / file, direction)
        entries.append(_entry(block, batch, store, kinds[key]))
    graphs[HEAD] = _export_head(subgraph, batch, store, directory)
    return {
        "graphs": graphs,
        "blocks": entries[: len(back)],
        "forward_only": entries[len(back) :],
    }


def _entry(block: Block, batch: dict[str, Tensor], store: FrozenStore, kind: str) -> dict[str, Any]:
    """A block's `StreamedBlock`."""
    name, jumps = block.name, block.subgraph.jumps
    weights = store.inputs({local: f"{name}.{local}" for local in block.weights})
    lora = {local: lora_name(f"{name}.{local}") for local in block.lora}
    entry: dict[str, Any] = {"name": name, "kind": kind, "weights": weights, "lora": lora}
    if renamed := block.renamed(batch):
        entry["cond"] = renamed
    if name in jumps:
        names = zip(STATE, residual_names(jumps[name]), strict=True)
        entry["residual"] = {state: residual for state, residual in names if state in batch}
    return entry


def new_kind(name: str, taken: list[str]) -> str:
    """Name of a new kind: "transformer_block" of "transformer_blocks.3"; then "...-2" and so on."""
    base = re.sub(r"s\.\d+$", "", name)
    same = sum(1 for kind in taken if kind.partition("-")[0] == base)
    return f"{base}-{same + 1}" if same else base


def _export_block(
    block: Block, batch: dict[str, Tensor], store: FrozenStore, path: Path, direction: str
) -> dict[str, list[str | None]]:
    state = {name: batch[name] for name in STATE if name in batch}
    cond = {local: batch[name] for local, name in block.cond(batch).items()}
    inputs = {**state, **cond, **block.weights, **block.lora}
    function, outputs = block.forward, [NEW + name for name in block.states]
    if direction == "backward":
        inputs |= {GRAD + name: state[name] for name in block.graded}
        function = block.backward
        outputs = [NEW + GRAD + n for n in state] + [GRAD + n for n in block.lora]
    small = fewer_bytes(store, {n: f"{block.name}.{n}" for n in block.weights})
    module = trace(function, inputs, block.subgraph.family)
    return write_graph(module, inputs, outputs, small, path)


def fewer_bytes(store: FrozenStore, names: Mapping[str, str]) -> dict[str, str]:
    """Of inputs of a graph those that are stored in fewer bytes than float32 -> how they are read.

    Args:
        store: of the bundle.
        names: input -> name in the store.
    """
    kinds = {local: store.read_as(name) for local, name in names.items()}
    return {local: kind for local, kind in kinds.items() if kind != WIDE}


def _export_head(
    subgraph: TrainableSubgraph, batch: dict[str, Tensor], store: FrozenStore, directory: Path
) -> dict[str, Any]:
    head = Head(subgraph)
    names = (TAIL_RESIDUAL, TARGET, WEIGHT, WEIGHT_MASK)
    inputs = {
        ENTRY: batch[ENTRY],
        **{n: v for n, v in batch.items() if n in names or n.startswith(COND)},
        **head.weights,
    }
    small = fewer_bytes(store, {name: name for name in head.weights})
    module = trace(head.backward, inputs, subgraph.family)
    outputs = [LOSS, NEW + GRAD + ENTRY]
    return write_graph(module, inputs, outputs, small, directory / HEAD)


def write_graph(
    module: Any,
    inputs: dict[str, Tensor],
    outputs: list[str],
    small: Mapping[str, str],
    path: Path,
    rewrites: Sequence[passes.Pass] = passes.FOR_ONNX,
) -> dict[str, list[str | None]]:
    """Export a traced graph; names of the inputs it reads, and of its outputs.

    Args:
        module: the graph; it is rewritten.
        inputs: an example of each, in order.
        outputs: names, in order.
        small: inputs that are stored in fewer bytes -> "float16", "int8" or "int4".
        path: of the .onnx file.
        rewrites: of the traced graph.
    """
    passes.apply(module, rewrites)
    model = onnx_model(module, inputs, outputs)
    transposes_to_gemm(model)
    read = [v for v in model.graph.inputs if v.uses() or v.is_graph_output()]
    model.graph.inputs[:] = read
    if small:
        weights_in_fewer_bytes(model, small)
        share_quantised(model)
    RemoveUnusedNodesPass()(model)
    ir.save(model, path, size_threshold_bytes=INLINE_BYTES)
    return graph_names(model)
