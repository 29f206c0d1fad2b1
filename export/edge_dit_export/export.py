"""A plan -> a bundle: each target's module in `edge_dit_export.targets` writes its own folder."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from edge_dit.budget.footprint import REFERENCE, Footprints, footprints_of
from edge_dit.contract.adapter import write_adapter
from edge_dit.contract.bundle import (
    ADAPTER,
    MANIFEST,
    Bundle,
    FileSpec,
    Manifest,
    TensorSpec,
    write_manifest,
)
from edge_dit.contract.names import GRAD, LOSS
from edge_dit.contract.targets import (
    TARGETS,
    WIDE,
    TargetVariant,
    compute_faults,
    tail_faults,
)
from edge_dit.errors import BadInput, raise_any, require
from edge_dit.models.model import Model
from edge_dit.models.pipeline import quiet
from edge_dit.planning.plan import LOOP_TARGET, Plan, loop_faults, model_of
from edge_dit.progress import bar
from edge_dit.reference.eager import adapted_subgraph, lora_tensors
from edge_dit.store.files import sha256, whole_folder
from edge_dit_export.sbom import SBOM, write_sbom
from edge_dit_export.targets.loop_source import LoopSource
from edge_dit_export.targets.source import Source


def export(
    plan: Plan,
    folder: Path,
    targets: Sequence[str],
    check: bool = True,
    loop: Callable[[Plan, Model], LoopSource] | None = None,
    version: int = 1,
) -> Bundle:
    """Write the bundle of a plan.

    Args:
        plan: what to train. Its model folder must still hold the model it was made for.
        folder: the bundle; written whole, or not at all.
        targets: some of `edge_dit.contract.targets.TARGETS`.
        check: compare the model's weights with those the plan was made for.
        loop: makes what the loop's parts are exported from, if the plan has a loop.
        version: of the bundle, see `edge_dit.contract.bundle.Manifest`.

    Raises:
        BadInput: a target's packages are missing or it cannot train with the plan's tail, the model
            changed, ``folder`` holds something else; or the loop's parts are wanted and cannot be
            exported, or not with these targets.
    """
    raise_any("export", loop_faults(plan.loop, plan.targets))
    raise_any("plan", tail_faults(plan.tail, targets))
    raise_any("export", compute_faults(plan.weights, plan.compute, plan.targets))
    for target in targets:
        for module in TARGETS[target].needs_to_export:
            with quiet():
                require(module, f"the {target} target")
    model = model_of(plan, check)
    subgraph, batch = adapted_subgraph(plan, model)
    parts = None
    if plan.loop and LOOP_TARGET in targets:
        if loop is None:
            raise BadInput(
                "plan", found="loop without prompts", expected="the job's prompts beside it"
            )
        parts = loop(plan, model)
    source = Source(
        subgraph,
        batch,
        plan.optimizer,
        plan.crop_rule,
        plan.weights,
        plan.recompute,
        parts,
        plan.compute,
    )
    with (
        whole_folder(folder, MANIFEST) as building,
        quiet(),
        bar("export", len(targets)) as advance,
    ):
        footprints = footprints_of(plan, REFERENCE)
        lora = lora_tensors(source.subgraph)
        write_adapter(building / ADAPTER, lora, plan.rank, plan.alpha)
        facts: dict[str, dict[str, Any]] = {}
        for target in targets:
            started = time.monotonic()
            directory = building / target
            directory.mkdir()
            writer = import_module(f"edge_dit_export.targets.{TARGETS[target].module}")
            written = writer.write(source, directory)
            facts[target] = {**written, "memory": _memory(footprints, plan, target, written)}
            advance(note=f"{target} {time.monotonic() - started:.0f} s")
        write_sbom(building / SBOM, plan, _packages(facts))
        manifest = _manifest(plan, source, facts, _files(building))
        bundle = write_manifest(building, manifest.model_copy(update={"version": version}))
    return replace(bundle, folder=folder)


def _packages(targets: Iterable[str]) -> list[str]:
    """Distributions that write the targets."""
    return list(dict.fromkeys(["edge-dit", *(t for n in targets for t in TARGETS[n].tools)]))


def _memory(
    footprints: Footprints, plan: Plan, target: str, facts: dict[str, Any]
) -> dict[str, int]:
    """Layout -> predicted peak of a training process, see `Facts.memory`."""
    read = TARGETS[target].facts.model_validate(facts)
    dtype, compute = facts.get("weights", WIDE), facts.get("compute", WIDE)
    trained = tuple(plan.trained)
    return {
        layout: footprints.of(
            trained, plan.rank, TargetVariant(target, layout, dtype, compute), plan.tail
        ).anonymous
        for layout in read.layouts()
    }


def _manifest(
    plan: Plan, source: Source, targets: dict[str, dict[str, Any]], files: list[FileSpec]
) -> Manifest:
    parameters = source.subgraph.lora_parameters()
    return Manifest(
        family=plan.family,
        plan=plan.shared(),
        plan_hash=plan.identity(),
        tensors=tensor_specs(source.batch, parameters),
        optimizer=plan.optimizer,
        targets=targets,
        tools={name: importlib.metadata.version(name) for name in _packages(targets)},
        files=files,
    )


def tensor_specs(batch: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> list[TensorSpec]:
    """The tensors of a manifest, in the order of the graphs' arguments.

    Args:
        batch: a draw, from `edge_dit.reference.eager.adapted_subgraph`.
        parameters: LoRA tensors by name.
    """
    return [
        *_specs(batch, "batch"),
        *_specs(parameters, "lora"),
        TensorSpec(name=LOSS, shape=(), role="output"),
        *_specs({GRAD + name: p for name, p in parameters.items()}, "output"),
    ]


def _specs(
    tensors: Mapping[str, Tensor], role: Literal["batch", "lora", "output"]
) -> list[TensorSpec]:
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
