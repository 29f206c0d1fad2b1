"""Traced train step -> ExecuTorch programs.

train.pte          batch and LoRA tensors -> loss and one gradient per LoRA tensor
optimizer.pte      `edge_dit.contract.adamw`; arguments as `AdamWStep.forward` takes them
patch_sampler.pte  image, sigma, uv -> patch; any image with sides from s_max to the largest

All three are plain inference programs: no autograd, no training module, so any ExecuTorch runtime
with the portable kernels and XNNPACK runs them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig, to_edge
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor
from torch.export import ExportedProgram

from edge_dit.contract.names import SAMPLER_INPUTS
from edge_dit.contract.targets import (
    INT8,
    OPTIMIZER_PROGRAM,
    SAMPLER_PROGRAM,
    TRAIN_PROGRAM,
    WIDE,
)
from edge_dit.models.patch_sampler import PatchSampler
from edge_dit.models.quantize import kinds_of, matrices, rounded
from edge_dit_export import passes
from edge_dit_export.graph.blocks import plain_name
from edge_dit_export.graph.flat_program import flat_program
from edge_dit_export.graph.trace import TracedStep
from edge_dit_export.graph.train_step import trace_train_step
from edge_dit_export.targets.convolution_of_tokens import convolution_of_tokens
from edge_dit_export.targets.delegates_once import delegates_once
from edge_dit_export.targets.relu_gradient_to_sign import relu_gradient_to_sign
from edge_dit_export.targets.source import Source
from edge_dit_export.targets.xnnpack import EDGE, Delegates


def write(source: Source, directory: Path) -> dict[str, Any]:
    """Write the ExecuTorch target into ``directory``, an existing folder.

    With int8 products the backward pass computes each block again: they are fast, and memory is
    what a phone lacks.

    Returns:
        ExecuTorch's version, how products are computed and, by file, the number of calls delegated
        to XNNPACK, how many of them are layers with frozen weights, and the bytes of memory planned
        for a run (weights not counted).
    """
    step = _int8_step(source) if source.compute != WIDE else source.step
    optimizer, sampler = source.optimizer, source.sampler
    sides = {
        2: torch.export.Dim("H", min=sampler.rule.s_max, max=source.max_image_side),
        3: torch.export.Dim("W", min=sampler.rule.s_max, max=source.max_image_side),
    }
    dynamic = dict(zip(SAMPLER_INPUTS, (sides, None, None), strict=True))
    with _quiet():
        module = passes.copy_of(step.module)
        passes.apply(module, passes.FOR_EXECUTORCH)
        convolution_of_tokens(module)
        relu_gradient_to_sign(module)
        delegates = Delegates(module)
        programs = {
            TRAIN_PROGRAM: _lower(flat_program(module, step.inputs.values()), delegates),
            OPTIMIZER_PROGRAM: _lower(flat_program(optimizer.module, optimizer.inputs.values())),
            SAMPLER_PROGRAM: _lower(
                torch.export.export(
                    sampler, _sampler_inputs(sampler), dynamic_shapes=dynamic, strict=False
                )
            ),
        }
    for file, program in programs.items():
        with (directory / file).open("wb") as stream:
            program.write_to_file(stream)
    delegated = {TRAIN_PROGRAM: (delegates.calls, delegates.layers)}
    facts = {}
    for file, program in programs.items():
        taken, layers = delegated.get(file, (0, 0))
        planned = _planned_bytes(program)
        facts[file] = {"delegated": taken, "frozen_layers": layers, "planned_bytes": planned}
    weights = WIDE if source.compute == WIDE else INT8
    return {
        "executorch": version("executorch"),
        "weights": weights,
        "compute": source.compute,
        "programs": facts,
    }


def _int8_step(source: Source) -> TracedStep:
    """The recomputing step; frozen matrices outside the blocks are rounded to int8 too."""
    subgraph = source.subgraph
    with source.computing(rows=True):
        step = trace_train_step(subgraph, source.batch, recompute=True)
    weights = matrices(subgraph)
    for name, kind in kinds_of(subgraph, source.stored).items():
        buffer = plain_name(name).replace(".", "__")
        if hasattr(step.module, buffer):
            setattr(step.module, buffer, rounded(weights[name].detach(), kind))
    return step


def _lower(program: ExportedProgram, delegates: Delegates | None = None) -> Any:
    """Lower ``program`` to an ExecutorchProgramManager; ``delegates`` were taken out of it."""
    edge = to_edge(program, compile_config=EDGE)
    if delegates is not None:
        delegates.put_back(edge.exported_program())
        # A new manager, because it collects the delegates' weights when it is made.
        edge = EdgeProgramManager(edge.exported_program(), compile_config=EDGE)
    # Inputs are read where the caller holds them, not copied into the program's own memory: the
    # optimizer's are four times the LoRA. But XNNPACK reads some bytes past the end of a tensor.
    planning = MemoryPlanningPass(alloc_graph_input=delegates is not None)
    config = ExecutorchBackendConfig(memory_planning_pass=planning)
    manager = edge.to_executorch(config)
    delegates_once(manager, config)
    return manager


def _planned_bytes(program: Any) -> int:
    return sum(program.executorch_program.execution_plan[0].non_const_buffer_sizes)


def _sampler_inputs(sampler: PatchSampler) -> tuple[Tensor, ...]:
    # The example sides differ: torch.export would take equal ones for one dimension.
    image = torch.zeros(1, 3, sampler.rule.s_max + 3, sampler.rule.s_max + 5)
    return image, torch.full((1,), 0.5), torch.full((2,), 0.5)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence deprecation warnings that torch and ExecuTorch cause themselves."""
    logger = logging.getLogger("torch.utils._pytree")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
            warnings.filterwarnings("ignore", "read_binary is deprecated", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
