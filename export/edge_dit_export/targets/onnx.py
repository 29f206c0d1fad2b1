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

from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.external_data import convert_tensors_to_external
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from edge_dit.contract.targets import (
    FUSED,
    OPTIMIZER,
    RECOMPUTE,
    SAMPLER,
    STEP_FILES,
    WIDE,
)
from edge_dit.models.quantize import matrices
from edge_dit.models.subgraph import TrainableSubgraph
from edge_dit_export import passes
from edge_dit_export.graph.blocks import frozen_tensors, plain_name
from edge_dit_export.graph.trace import TracedStep
from edge_dit_export.passes_onnx.transposes_to_gemm import transposes_to_gemm
from edge_dit_export.targets.frozen import FrozenStore
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

    With frozen matrices in float16 or int8 only the streamed layout is written.

    Returns:
        The target's facts: opset, IR, and those of `edge_dit.contract.targets.OnnxFacts`.
    """
    subgraph, weights = source.subgraph, source.weights
    store = frozen_store(subgraph, weights)
    streamed = export_streamed(subgraph, source.batch, store, directory)
    loop = source.loop and export_loop(source.loop, subgraph, store, directory)
    files = store.write(directory)
    steps: dict[str, TracedStep] = {}
    if weights == WIDE:
        steps[STEP_FILES[FUSED]] = source.step
        if source.recompute:
            steps[STEP_FILES[RECOMPUTE]] = source.recomputing_step
    optimizer = source.optimizer
    update = onnx_model(optimizer.module, optimizer.inputs, optimizer.outputs)
    models = {OPTIMIZER: update, SAMPLER: patch_sampler_model(source.sampler)}
    for file, step in steps.items():
        models[file] = train_step_model(step)
        _refer_to(store, models[file], directory / f"{file}.data")
    for file, model in models.items():
        ir.save(model, directory / file)
    return {
        "opset": OPSET,
        "ir": IR,
        "frozen": files,
        "weights": weights,
        "graphs": {file: graph_names(model) for file, model in models.items()},
        "streamed": streamed,
        **({"loop": loop} if loop else {}),
    }


def frozen_store(subgraph: TrainableSubgraph, weights: str) -> FrozenStore:
    """The frozen weights of a sub-graph, its matrices stored as ``weights``."""
    small = {plain_name(name) for name in matrices(subgraph)}
    return FrozenStore(frozen_tensors(subgraph), small, weights)


def train_step_model(step: TracedStep) -> ir.Model:
    """The ONNX model of a whole step; its frozen weights are still in memory."""
    module = passes.copy_of(step.module)
    passes.apply(module, passes.FOR_STORED_WEIGHTS)
    model = onnx_model(module, step.inputs, step.outputs)
    transposes_to_gemm(model)
    RemoveUnusedNodesPass()(model)
    return model


def _refer_to(store: FrozenStore, model: ir.Model, data: Path) -> None:
    """Make initialisers that are frozen weights refer to the bytes in the store's files, in place.
    Other large ones (kernels turned for the backward pass) go to the file ``data``.
    """
    stored = {
        (tensor.data_ptr(), tensor.numel()): name
        for name, tensor in store.tensors.items()
        if isinstance(tensor, Tensor)
        and tensor.is_contiguous()
        and store.stored_as(name) == "float32"
    }
    others = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= INLINE_BYTES:
            continue
        raw = getattr(tensor, "raw", None)
        if not isinstance(raw, Tensor) or (raw.data_ptr(), raw.numel()) not in stored:
            others.append(value)
            continue
        key = (raw.data_ptr(), raw.numel())
        place = store.place(stored[key])
        value.const_value = ir.ExternalTensor(
            place.file,
            place.offset,
            place.length,
            tensor.dtype,
            shape=ir.Shape(raw.shape),
            name=str(value.name),
            base_dir=data.parent,
        )
    tensors = [value.const_value for value in others if value.const_value is not None]
    for value, tensor in zip(
        others, convert_tensors_to_external(tensors, data.parent, data.name), strict=True
    ):
        value.const_value = tensor
