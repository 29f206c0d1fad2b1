"""torch module -> ONNX model; every ONNX file of a bundle comes from here."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)
from onnxscript.optimizer import fold_constants
from torch import Tensor, fx, nn

from edge_dit.contract.names import PATCH, SAMPLER_INPUTS
from edge_dit.models.patch_sampler import PatchSampler
from edge_dit_export.graph.flat_program import flat_program
from edge_dit_export.passes_onnx.products_in_int8 import TRANSLATIONS

OPSET = 18
"""The opset the dynamo exporter writes without converting; every runtime since 2023 has it."""
IR = 10
"""Newest IR version that onnxruntime 1.19 reads."""
INLINE_BYTES = 1024
"""Smaller constants (shapes, scalars) stay in the .onnx file, where shape inference reads them."""


def onnx_model(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: list[str],
    dynamic_shapes: dict[str, Any] | None = None,
) -> ir.Model:
    """Export ``module(*inputs.values())``; its buffers and parameters become initialisers.

    Args:
        module: takes tensors only, returns a tensor or a flat tuple of tensors. A graph module must
            come from `edge_dit_export.graph.trace`; it is not traced again.
        inputs: an example of every input by its name in the graph; unused ones stay inputs.
        outputs: names of the outputs.
        dynamic_shapes: as `torch.export.export` takes them, by argument of ``forward``.
    """
    examples = tuple(tensor.detach() for tensor in inputs.values())
    with _quiet():
        program = torch.onnx.export(
            flat_program(module, examples) if isinstance(module, fx.GraphModule) else module,
            examples,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=dynamic_shapes,
            # Its rewriter takes most of the export's time and finds nothing in these graphs that
            # onnxruntime does not find when it loads them.
            optimize=False,
            verbose=False,
            custom_translation_table=TRANSLATIONS,
        )
    assert program is not None
    model = program.model
    fold_constants(model, should_fold=_should_fold)
    # Metadata holds stack traces with the exporting machine's paths.
    clean = Sequential(
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        CommonSubexpressionEliminationPass(),
        DeduplicateInitializersPass(size_limit=INLINE_BYTES),
        RemoveUnusedNodesPass(),
        ClearMetadataAndDocStringPass(),
    )
    model = clean(model).model
    model.ir_version = IR
    return model


def _should_fold(node: ir.Node) -> bool | None:
    """Fold reshaped weights, whatever their size, but no transposed ones: those would be stored
    twice.
    """
    return {"Reshape": True, "Transpose": False}.get(node.op_type)


def patch_sampler_model(sampler: PatchSampler) -> ir.Model:
    """Inputs "image" [1, 3, H, W] of any size, "sigma" [1], "uv" [2]; output "patch"."""
    image, sigma, uv = SAMPLER_INPUTS
    # The example sides differ: torch.export would take equal ones for one dimension.
    examples = {
        image: torch.zeros(1, 3, sampler.rule.s_max + 3, sampler.rule.s_max + 5),
        sigma: torch.full((1,), 0.5),
        uv: torch.full((2,), 0.5),
    }
    sides = {
        2: torch.export.Dim("H", min=sampler.rule.s_max),
        3: torch.export.Dim("W", min=sampler.rule.s_max),
    }
    return onnx_model(sampler, examples, [PATCH], {image: sides, sigma: None, uv: None})


def graph_names(model: ir.Model) -> dict[str, list[str | None]]:
    """Names of a graph's arguments and results, see `edge_dit.contract.targets.GraphNames`."""
    graph = model.graph
    return {"inputs": [v.name for v in graph.inputs], "outputs": [v.name for v in graph.outputs]}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings about missing torchvision, about its own deprecations, and
    about training mode, which changes nothing in the modules exported here.
    """
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
            warnings.filterwarnings("ignore", "Exporting a model while it is in training mode")
            yield
    finally:
        logger.setLevel(level)
