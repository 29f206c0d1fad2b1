"""Traced train step -> plain ONNX: standard operators only, for any onnxruntime.

train_step.onnx       batch and LoRA tensors -> loss and one gradient per LoRA tensor
train_step.onnx.data  the frozen weights, each once, memory-mapped when loaded
optimizer.onnx        `edge_dit.adamw`
patch_sampler.onnx
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edge_dit.patch_sampler import PatchSampler
from edge_dit_export import passes
from edge_dit_export.onnx_model import INLINE_BYTES, IR, OPSET, onnx_model, patch_sampler_model
from edge_dit_export.optimizer import AdamWStep
from edge_dit_export.passes_onnx.transposes_to_gemm import transposes_to_gemm
from edge_dit_export.train_step import TrainStepGraph

TRAIN_STEP = "train_step.onnx"
OPTIMIZER = "optimizer.onnx"
SAMPLER = "patch_sampler.onnx"


def export_onnx(
    step: TrainStepGraph, optimizer: AdamWStep, sampler: PatchSampler, directory: Path
) -> dict[str, Any]:
    """Write the plain ONNX target into ``directory``, an existing folder.

    Returns:
        opset, IR, file names, input and output names of each graph.
    """
    module = passes.copy_of(step.module)
    passes.apply(module, passes.FOR_ONNX)
    model = onnx_model(module, step.inputs, step.outputs)
    transposes_to_gemm(model)
    RemoveUnusedNodesPass()(model)
    models = {
        TRAIN_STEP: model,
        OPTIMIZER: optimizer_model(optimizer),
        SAMPLER: patch_sampler_model(sampler),
    }
    for file, model in models.items():
        data = f"{file}.data" if file == TRAIN_STEP else None
        ir.save(model, directory / file, external_data=data, size_threshold_bytes=INLINE_BYTES)
    graphs = {file: _names(model) for file, model in models.items()}
    return {"opset": OPSET, "ir": IR, "data": f"{TRAIN_STEP}.data", "graphs": graphs}


def optimizer_model(optimizer: AdamWStep) -> ir.Model:
    """Inputs "lr", "step", "<lora>", "grad.<lora>", "exp_avg.<lora>", "exp_avg_sq.<lora>"; outputs
    "new.<lora>", "new.exp_avg.<lora>", "new.exp_avg_sq.<lora>".
    """
    kinds = ("", "grad.", "exp_avg.", "exp_avg_sq.")
    shapes = dict(zip(optimizer.names, optimizer.shapes, strict=True))
    inputs = {"lr": torch.ones(1), "step": torch.ones(1)} | {
        kind + name: torch.zeros(shape) for kind in kinds for name, shape in shapes.items()
    }
    outputs = [f"new.{kind}{name}" for kind in kinds if kind != "grad." for name in shapes]
    return onnx_model(optimizer, inputs, outputs)


def _names(model: ir.Model) -> dict[str, list[str | None]]:
    graph = model.graph
    return {"inputs": [v.name for v in graph.inputs], "outputs": [v.name for v in graph.outputs]}
