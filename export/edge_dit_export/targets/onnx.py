"""Traced train step -> plain ONNX: standard operators only, for any onnxruntime.

train_step.onnx            fused: batch and LoRA tensors -> loss, one gradient per LoRA tensor
train_step.recompute.onnx  the same, but the backward pass computes every block again
block.*.onnx, head.onnx    streamed, see `edge_dit_export.targets.streamed`
frozen.safetensors         the frozen weights, each once; memory-mapped when loaded
frozen-1.safetensors ...   those beyond 512 MB
*.data                     other large constants of a graph, such as turned kernels
begin.onnx and so on        the loop's parts, see `edge_dit_export.targets.loop`
optimizer.onnx             AdamW, see `edge_dit.contract.adamw`
patch_sampler.onnx         image, sigma, uv -> patch
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.external_data import convert_tensors_to_external
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from edge_dit.contract.names import LOSS, TARGET
from edge_dit.contract.targets import (
    FUSED,
    OPTIMIZER,
    RECOMPUTE,
    SAMPLER,
    STEP_FILES,
    WIDE,
)
from edge_dit.models.quantize import kinds_of
from edge_dit.models.subgraph import TrainableSubgraph
from edge_dit_export import passes
from edge_dit_export.graph.blocks import frozen_tensors, plain_name
from edge_dit_export.graph.trace import TracedStep
from edge_dit_export.graph.train_step import trace_train_step
from edge_dit_export.passes_onnx.products_in_int8 import share_quantised
from edge_dit_export.passes_onnx.recompute_cheap import recompute_cheap
from edge_dit_export.passes_onnx.transposes_to_gemm import transposes_to_gemm
from edge_dit_export.passes_onnx.weights_in_fewer_bytes import weights_in_fewer_bytes
from edge_dit_export.targets.frozen import FrozenStore, Place
from edge_dit_export.targets.loop import export_loop
from edge_dit_export.targets.onnx_model import (
    INLINE_BYTES,
    IR,
    OPSET,
    graph_names,
    onnx_model,
    patch_sampler_model,
)
from edge_dit_export.targets.source import Source
from edge_dit_export.targets.streamed import export_streamed


def write(source: Source, directory: Path) -> dict[str, Any]:
    """Write the plain ONNX target into ``directory``, an existing folder.

    With frozen matrices in float16 or int4, or in int8 without int8 products, only the streamed
    layout is written.

    Returns:
        The target's facts: opset, IR, and those of `edge_dit.contract.targets.OnnxFacts`.
    """
    subgraph = source.subgraph
    store = frozen_store(subgraph, source.stored)
    # Before the other graphs: it adds weights to the store. The loop's parts compute in float32.
    loop = source.loop and export_loop(source.loop, subgraph, store, source.stored, directory)
    files = store.write(directory)
    optimizer = source.optimizer
    update = onnx_model(optimizer.module, optimizer.inputs, optimizer.outputs)
    models = {OPTIMIZER: update, SAMPLER: patch_sampler_model(source.sampler)}
    with source.computing():
        streamed = export_streamed(subgraph, source.batch, store, directory)
        for file, step in _steps(source).items():
            models[file] = train_step_model(step, store, directory / f"{file}.data")
    if STEP_FILES[FUSED] in models:
        recompute_cheap(models[STEP_FILES[FUSED]], LOSS, TARGET)
    for file, model in models.items():
        ir.save(model, directory / file)
    return {
        "opset": OPSET,
        "ir": IR,
        "frozen": files,
        "weights": source.weights,
        "compute": source.compute,
        "graphs": {file: graph_names(model) for file, model in models.items()},
        "streamed": streamed,
        **({"loop": loop} if loop else {}),
    }


def _steps(source: Source) -> dict[str, TracedStep]:
    """The steps that are one graph, by file."""
    if source.compute == WIDE:
        fused = {STEP_FILES[FUSED]: source.step} if source.weights == WIDE else {}
        more = source.recompute and bool(fused)
        return {**fused, **({STEP_FILES[RECOMPUTE]: source.recomputing_step} if more else {})}
    layouts = (FUSED, RECOMPUTE) if source.recompute else (FUSED,)
    return {
        STEP_FILES[layout]: trace_train_step(source.subgraph, source.batch, layout == RECOMPUTE)
        for layout in layouts
    }


def frozen_store(subgraph: TrainableSubgraph, dtype: str) -> FrozenStore:
    """The frozen weights of a sub-graph, its matrices stored as ``dtype``, see `kinds_of`."""
    kinds = {plain_name(name): kind for name, kind in kinds_of(subgraph, dtype).items()}
    return FrozenStore(frozen_tensors(subgraph), kinds)


def train_step_model(step: TracedStep, store: FrozenStore, data: Path) -> ir.Model:
    """The ONNX model of a whole step.

    Args:
        step: traced.
        store: its frozen weights, written; the model refers to their bytes.
        data: file beside them for other large constants, such as kernels turned for the backward
            pass.
    """
    module = passes.copy_of(step.module)
    passes.apply(module, passes.FOR_STORED_WEIGHTS)
    model = onnx_model(module, step.inputs, step.outputs)
    transposes_to_gemm(model)
    RemoveUnusedNodesPass()(model)
    _refer_to(store, model, data)
    return model


def _refer_to(store: FrozenStore, model: ir.Model, data: Path) -> None:
    """Make initialisers that are frozen weights refer to the bytes in the store's files, in place.
    Other large ones go to the file ``data``.
    """
    stored = {
        (tensor.data_ptr(), tensor.numel()): name
        for name, tensor in store.tensors.items()
        if isinstance(tensor, Tensor) and tensor.is_contiguous()
    }
    frozen, others = {}, []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        raw = getattr(tensor, "raw", None)
        name = stored.get((raw.data_ptr(), raw.numel())) if isinstance(raw, Tensor) else None
        rounded = name is not None and store.stored_as(name) != WIDE
        if tensor is None or (tensor.nbytes <= INLINE_BYTES and not rounded):
            continue
        if name is None:
            others.append(value)
        else:
            frozen[value] = name
    for value, name in frozen.items():
        if store.stored_as(name) == WIDE:
            value.const_value = _stored(value, store.place(name), data.parent)
    small = {value: name for value, name in frozen.items() if store.stored_as(name) != WIDE}
    _in_fewer_bytes(model, small, store, data.parent)
    tensors = [value.const_value for value in others if value.const_value is not None]
    for value, tensor in zip(
        others, convert_tensors_to_external(tensors, data.parent, data.name), strict=True
    ):
        value.const_value = tensor


def _in_fewer_bytes(
    model: ir.Model, small: Mapping[ir.Value, str], store: FrozenStore, folder: Path
) -> None:
    """Let initialisers be what the store holds in fewer bytes, in place.

    Args:
        model: of a whole step.
        small: initialiser -> name in the store.
        store: written.
        folder: of its files.
    """
    if not small:
        return
    graph = model.graph
    for value in small:  # inputs for as long as the graph is rewritten
        value.const_value = None
        del graph.initializers[str(value.name)]
        graph.inputs.append(value)
    names = {str(value.name): name for value, name in small.items()}
    weights_in_fewer_bytes(model, {local: store.read_as(name) for local, name in names.items()})
    share_quantised(model)
    RemoveUnusedNodesPass()(model)
    for value in list(graph.inputs):
        local = str(value.name)
        name = names.get(local) or names.get(local.removesuffix(".scale"))
        if name is not None:
            graph.inputs.remove(value)
            key = name if local in names else f"{name}.scale"
            value.const_value = _stored(value, store.place(key), folder)
            graph.register_initializer(value)


def _stored(value: ir.Value, place: Place, folder: Path) -> ir.ExternalTensor:
    """Bytes of a file as the value of an initialiser."""
    assert value.dtype is not None
    assert value.shape is not None
    return ir.ExternalTensor(
        place.file,
        place.offset,
        place.length,
        value.dtype,
        shape=ir.Shape(value.shape.numpy()),
        name=str(value.name),
        base_dir=folder,
    )
