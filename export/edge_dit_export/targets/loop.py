"""Writes the loop's parts into the onnx target's folder, see `edge_dit.contract.loop`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_dit.contract.loop import (
    BEGIN,
    DECODER,
    ENCODER,
    LEVELS,
    PAINT,
    PREDICT,
    PROMPT,
    TABLES,
    TILE,
    base_file,
    paint_file,
)
from edge_dit.contract.names import NEW, STATE
from edge_dit.contract.objective import FlowMatching
from edge_dit.contract.targets import INT8, ROTATED, WIDE
from edge_dit.errors import BadInput
from edge_dit.models.quantize import kind_in_block, matrices
from edge_dit.models.rotation import taken_for_rotated
from edge_dit.models.subgraph import TrainableSubgraph, lora_name
from edge_dit.store.tensors import write_tensors
from edge_dit_export import passes
from edge_dit_export.graph.blocks import Block
from edge_dit_export.graph.parts import Part, begin_part, decoder_part, encoder_part, predict_part
from edge_dit_export.graph.trace import trace
from edge_dit_export.targets.frozen import FrozenStore, Later
from edge_dit_export.targets.loop_source import LoopSource
from edge_dit_export.targets.streamed import fewer_bytes, new_kind, write_graph

VAE = "vae."
"""Prefix of the autoencoder's weights in the files of frozen weights."""


def export_loop(
    source: LoopSource, subgraph: TrainableSubgraph, store: FrozenStore, dtype: str, directory: Path
) -> dict[str, Any]:
    """Write the parts into ``directory``, an existing folder.

    Args:
        source: what they are made from.
        subgraph: the trained blocks, LoRA in place.
        store: gets the weights that it lacks; not written yet.
        dtype: how blocks' matrices are stored.
        directory: of the onnx target.

    Returns:
        The fields of `edge_dit.contract.loop.LoopFacts`.

    Raises:
        BadInput: a part cannot be exported; it is named.
    """
    _add_blocks(source, store, dtype)
    blocks = [*source.family.blocks(source.skeleton).values(), *subgraph.blocks()]
    with taken_for_rotated(blocks) if dtype == ROTATED else nullcontext():
        return _export_loop(source, subgraph, store, directory)


def _export_loop(
    source: LoopSource, subgraph: TrainableSubgraph, store: FrozenStore, directory: Path
) -> dict[str, Any]:
    writer = _Writer(source, store, directory)
    model, family = source.skeleton, source.family
    batch = writer.part(BEGIN, begin_part(family, model, *source.blank(source.grid), source.grid))
    whole = TrainableSubgraph(model, family, range(source.layers), source.grid)
    blocks = writer.blocks(whole, batch, base_file)
    writer.part(ENCODER, encoder_part(family, source.vae, min(source.patch, TILE)), VAE)
    paint_blocks: list[dict[str, Any]] = []
    if source.painting is not None:
        paint_blocks = _export_painting(writer, source.with_lora(subgraph))
    write_tensors(directory / TABLES, tables_of(source))
    draws = source.prompts.draws.model_dump(exclude_defaults=True)
    return {
        "graphs": writer.graphs,
        "block_graphs": writer.block_graphs,
        "blocks": blocks,
        "paint_blocks": paint_blocks,
        "per_prompt": list(source.per_prompt),
        **({"placed": list(source.placed)} if source.placed else {}),
        "latents": family.latents(source.vae).model_dump(mode="json"),
        "levels": source.levels.model_dump(mode="json"),
        "timestep_factor": family.timestep_factor(model.config),
        "tile": TILE,
        "prompts": source.texts,
        "caption": source.prompts.caption,
        "previews": source.prompts.previews,
        "negatives": source.negatives,
        "negative": source.negative,
        "painting": source.painting and source.painting.model_dump(mode="json"),
        "no_painting": source.no_painting,
        **({"draws": draws} if draws else {}),
    }


def _add_blocks(source: LoopSource, store: FrozenStore, dtype: str) -> None:
    """Add the weights of the blocks that are not trained; each is read when it is written."""
    small = matrices(source.skeleton)
    for name, block in source.family.blocks(source.skeleton).items():
        for local, tensor in block.state_dict().items():
            full = f"{name}.{local}"
            later = Later(tuple(tensor.shape), partial(source.checkpoint.tensor, full))
            kind = kind_in_block(later.shape, dtype) if full in small else WIDE
            store.add(full, later, kind)


def _export_painting(writer: _Writer, whole: TrainableSubgraph) -> list[dict[str, Any]]:
    """Write what painting needs besides; the blocks."""
    source = writer.source
    family, model, grid = source.family, source.skeleton, source.picture
    batch = writer.part(PAINT + BEGIN, begin_part(family, model, *source.blank(grid), grid))
    blocks = writer.blocks(whole, batch, paint_file)
    writer.part(PREDICT, predict_part(family, model, batch, grid))
    writer.part(DECODER, decoder_part(family, source.vae, min(source.side, TILE)), VAE)
    return blocks


def tables_of(source: LoopSource) -> dict[str, np.ndarray]:
    """The tensors of `TABLES`: noise levels and encoded prompts."""
    objective = source.objective
    flow = isinstance(objective, FlowMatching)
    levels = objective.sigmas if flow else objective.alphas_cumprod
    tables = {LEVELS: levels.astype("float64")}
    for number, prompt in enumerate(source.encoded):
        tables |= {f"{PROMPT}{number}.{name}": value.numpy() for name, value in prompt.items()}
    return tables


@dataclass(frozen=True)
class _Writer:
    """Writes graphs, and adds what they read to the frozen weights."""

    source: LoopSource
    store: FrozenStore
    directory: Path
    graphs: dict[str, Any] = field(default_factory=dict)
    block_graphs: dict[str, Any] = field(default_factory=dict)

    def part(self, file: str, part: Part, prefix: str = "") -> dict[str, Tensor]:
        """Write a part; examples of its results.

        Args:
            file: its name.
            part: to write.
            prefix: of its weights in the files of frozen weights.
        """
        store, half = self.store, bool(prefix) and self.store.rounds
        with _naming(file):
            step, weights, constants = part.trace()
            keys = {name: prefix + name for name in weights}
            keys |= {name: f"{file.removesuffix('.onnx')}.{name}" for name in constants}
            dtypes = {
                name: "float16" if half and name in weights and tensor.ndim > 1 else WIDE
                for name, tensor in {**weights, **constants}.items()
            }
            stored = store.tensors.keys() & keys.values()
            dtypes |= {n: store.stored_as(key) for n, key in keys.items() if key in stored}
            small = {n: INT8 if d == ROTATED else d for n, d in dtypes.items() if d != WIDE}
            path = self.directory / file
            names = write_graph(
                step.module, step.inputs, step.outputs, small, path, passes.FOR_FORWARD
            )
            read = {name: keys[name] for name in names["inputs"] if name in keys}
            for name, key in read.items():
                store.add(key, {**weights, **constants}[name], dtypes[name])
            self.graphs[file] = {**names, "weights": store.inputs(read)}
        return _examples(step.module, step.outputs)

    def blocks(
        self,
        whole: TrainableSubgraph,
        batch: Mapping[str, Tensor],
        file_of: Callable[[str], str],
    ) -> list[dict[str, Any]]:
        """Write the forward graph of every kind of blocks; the blocks.

        Args:
            whole: all blocks, with LoRA or without.
            batch: state and conditioning, as examples.
            file_of: name of a kind's graph.
        """
        kinds: dict[tuple[Any, ...], str] = {}
        blocks = []
        for name in whole.order:
            block = Block(whole, name)
            key = block.kind()
            if key not in kinds:
                kinds[key] = new_kind(name, list(kinds.values()))
                file = file_of(kinds[key])
                with _naming(file):
                    self.block_graphs[file] = self._block(block, batch, file)
            weights = self.store.inputs({local: f"{name}.{local}" for local in block.weights})
            lora = {local: lora_name(f"{name}.{local}") for local in block.lora}
            entry = {"name": name, "kind": kinds[key], "weights": weights, "lora": lora}
            blocks.append({**entry, "cond": block.renamed(batch)})
        return blocks

    def _block(self, block: Block, batch: Mapping[str, Tensor], file: str) -> dict[str, Any]:
        own = {
            name: torch.empty(tensor.shape) if tensor.is_meta else tensor
            for name, tensor in {**block.weights, **block.lora}.items()
        }
        given = {n: t for n, t in batch.items() if n in STATE}
        given |= {local: batch[name] for local, name in block.cond(batch).items()}
        after = [NEW + name for name in block.states]
        small = fewer_bytes(self.store, {n: f"{block.name}.{n}" for n in block.weights})
        inputs = {**given, **own}
        module = trace(block.forward, inputs, self.source.family)
        return write_graph(module, inputs, after, small, self.directory / file)


def _examples(module: Any, names: list[str]) -> dict[str, Tensor]:
    """Tensors of the shapes of a traced graph's results; their values mean nothing."""
    (results,) = next(node for node in module.graph.nodes if node.op == "output").args
    shapes = [node.meta["val"].shape for node in results]
    return {name: torch.zeros(shape) for name, shape in zip(names, shapes, strict=True)}


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Report what fails within as a fault of a part."""
    try:
        yield
    except Exception as error:  # the exporter's errors have no common base
        lines = f"{type(error).__name__}: {error}".splitlines()
        raise BadInput(
            f"{file} of the loop",
            found=f"cannot be exported: {lines[0]:.300}",
            expected="a model whose parts torch can export to ONNX",
            remedy="export without [export] loop; the bundle then trains from banks",
        ) from error
