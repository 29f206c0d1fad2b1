"""A plan -> a bundle."""

from __future__ import annotations

import importlib.metadata
import time
from pathlib import Path
from typing import Any

from edge_dit.contract.adapter import write_adapter
from edge_dit.contract.bundle import (
    ADAPTER,
    MANIFEST,
    SCHEMA,
    FileSpec,
    Manifest,
    TensorSpec,
    write_manifest,
)
from edge_dit.errors import require
from edge_dit.models.pipeline import quiet
from edge_dit.pictures.patch_sampler import PatchSampler
from edge_dit.planning.plan import Plan, model_of
from edge_dit.progress import bar
from edge_dit.reference.eager import adapted_subgraph, lora_tensors
from edge_dit.store.files import sha256, whole_folder
from edge_dit_export.graph.optimizer import AdamWStep, trace_optimizer
from edge_dit_export.graph.trace import TracedStep
from edge_dit_export.graph.train_step import trace_train_step

MAX_IMAGE_SIDES = 4
"""The patch sampler takes images with sides up to this many times s_max."""
TOOLS = {
    "onnx": ("torch", "onnx", "onnxscript"),
    "ort-training": ("torch", "onnx", "onnxscript", "onnxruntime-training-cpu"),
    "executorch": ("torch", "executorch"),
}
MODULES = {
    "onnx": ("onnx", "onnxscript"),
    "ort-training": ("onnx", "onnxscript", "onnxruntime.training"),
    "executorch": ("executorch",),
}
"""What each target's export imports."""


def export(plan: Plan, folder: Path, targets: list[str], check: bool = True) -> Manifest:
    """Write the bundle of a plan.

    Args:
        plan: what to train; its model folder must be the one it was made for.
        folder: where the bundle goes; put in place whole, or not at all.
        targets: some of `edge_dit.contract.bundle.TARGETS`.
        check: compare the model's weights with those the plan was made for.

    Raises:
        BadInput: a target's packages are missing, the model changed, ``folder`` holds something
            else.
    """
    for target in targets:
        for module in MODULES[target]:
            with quiet():
                require(module, f"the {target} target")
    subgraph, batch = adapted_subgraph(plan, model_of(plan, check))
    adamw = plan.optimizer
    sampler = PatchSampler(plan.crop_rule)
    parameters = subgraph.lora_parameters()
    step: TracedStep | None = None
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    facts: dict[str, dict[str, Any]] = {}
    with (
        whole_folder(folder, MANIFEST) as building,
        quiet(),
        bar("export", len(targets)) as advance,
    ):
        write_adapter(building / ADAPTER, lora_tensors(subgraph), plan.rank, plan.alpha)
        for target in targets:
            started = time.monotonic()
            directory = building / target
            directory.mkdir()
            if target == "ort-training":
                from edge_dit_export.targets.ort_training import export_ort_training

                facts[target] = export_ort_training(subgraph, batch, adamw, sampler, directory)
            else:
                if target == "executorch" or plan.weights == "float32":
                    step = step or trace_train_step(subgraph, batch)
                optimizer = trace_optimizer(AdamWStep(adamw, shapes))
                if target == "onnx":
                    from edge_dit_export.targets.onnx import RECOMPUTE, TRAIN_STEP, export_onnx

                    steps = {}
                    if plan.weights == "float32" and step is not None:
                        steps[TRAIN_STEP] = step
                        if plan.recompute:
                            steps[RECOMPUTE] = trace_train_step(subgraph, batch, recompute=True)
                    facts[target] = export_onnx(
                        subgraph, batch, steps, optimizer, sampler, directory, plan.weights
                    )
                else:
                    from edge_dit_export.targets.executorch import export_executorch

                    assert step is not None
                    side = MAX_IMAGE_SIDES * plan.s_max
                    facts[target] = export_executorch(step, optimizer, sampler, directory, side)
            advance(note=f"{target} {time.monotonic() - started:.0f} s")
        tools = {t: importlib.metadata.version(t) for name in targets for t in TOOLS[name]}
        manifest = Manifest(
            schema_version=SCHEMA,
            family=plan.family,
            plan=plan.model_dump(mode="json"),
            plan_hash=plan.identity(),
            tensors=[
                *_specs(batch, "batch"),
                *_specs(parameters, "lora"),
                TensorSpec(name="loss", shape=(), role="output"),
                *_specs({f"grad.{k}": p for k, p in parameters.items()}, "output"),
            ],
            optimizer=plan.optimizer,
            targets=facts,
            tools={"edge-dit": importlib.metadata.version("edge-dit"), **tools},
            files=_files(building),
        )
        write_manifest(building, manifest)
    return manifest


def _specs(tensors: Any, role: Any) -> list[TensorSpec]:
    return [
        TensorSpec(
            name=name,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            role=role,
        )
        for name, tensor in tensors.items()
    ]


def _files(folder: Path) -> list[FileSpec]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return [
        FileSpec(path=p.relative_to(folder).as_posix(), bytes=p.stat().st_size, sha256=sha256(p))
        for p in paths
    ]
