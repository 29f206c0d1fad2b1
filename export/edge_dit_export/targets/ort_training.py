"""Sub-graph -> onnxruntime-training artifacts (onnxruntime-training-cpu 1.19.2).

    training_model.onnx   loss and gradients; batch and frozen weights are its inputs
    eval_model.onnx       the loss alone
    optimizer_model.onnx  clipping and AdamW, see `edge_dit.contract.adamw`
    checkpoint            the LoRA tensors by diffusers name, which are the parameters
    frozen.safetensors    the frozen inputs, memory-mappable
    patch_sampler.onnx    image, sigma, uv -> patch

Frozen weights are inputs rather than parameters. Making the artifacts then does not need several
times the model's memory, and the checkpoint holds only the adapter.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass
from torch import Tensor, nn
from torch.func import functional_call

from edge_dit.contract.adamw import AdamW
from edge_dit.contract.names import LOSS, is_b
from edge_dit.contract.targets import OPTIMIZER_MODEL, SAMPLER, TRAINING_MODEL
from edge_dit.errors import BadInput
from edge_dit.models.subgraph import TrainableSubgraph
from edge_dit_export.passes_onnx.cast_like_to_cast import cast_like_to_cast
from edge_dit_export.passes_onnx.complete_layer_norm import complete_layer_norm
from edge_dit_export.passes_onnx.conv1x1_to_matmul import conv1x1_to_matmul
from edge_dit_export.passes_onnx.depthwise_grad_to_conv import depthwise_grad_to_conv
from edge_dit_export.passes_onnx.expand_clip_grad_norm import expand_clip_grad_norm
from edge_dit_export.passes_onnx.partial_split_to_slice import partial_split_to_slice
from edge_dit_export.passes_onnx.rate_of_b import rate_of_b
from edge_dit_export.targets.frozen import FrozenStore
from edge_dit_export.targets.onnx_model import IR, OPSET, onnx_model, patch_sampler_model
from edge_dit_export.targets.source import Source


class _Forward(nn.Module):
    """The sub-graph as a function of every tensor: batch, LoRA, frozen weights.

    LoRA tensors enter as inputs so that the exporter cannot fold their transposes into new
    constants, which would lose their names.
    """

    def __init__(self, subgraph: TrainableSubgraph, batch: list[str], state: list[str]) -> None:
        super().__init__()
        # In a list: a submodule's parameters would be exported as constants too.
        self.subgraph, self.batch, self.state = [subgraph], batch, state

    def forward(self, *tensors: Tensor) -> Tensor:
        batch = dict(zip(self.batch, tensors, strict=False))
        state = dict(zip(self.state, tensors[len(batch) :], strict=True))
        return functional_call(self.subgraph[0], state, (batch,))


def write(source: Source, directory: Path) -> dict[str, Any]:
    """Write the artifacts into ``directory``, an existing folder.

    Returns:
        Opset, IR, and the fields of `edge_dit.contract.targets.OrtTrainingFacts`.
    """
    subgraph = source.subgraph
    lora = {name: p.detach() for name, p in subgraph.lora_parameters().items()}
    frozen = _frozen(subgraph)
    model = _forward_model(subgraph, source.batch, lora, frozen)
    _make_artifacts(model, lora, source.adamw, directory)
    files = FrozenStore(frozen, {}).write(directory)
    ir.save(patch_sampler_model(source.sampler), directory / SAMPLER)
    return {"opset": OPSET, "ir": IR, "frozen": list(frozen), "files": files}


def _frozen(subgraph: TrainableSubgraph) -> dict[str, Tensor]:
    state = [*subgraph.named_parameters(), *subgraph.named_buffers()]
    return {name: tensor.detach() for name, tensor in state if not tensor.requires_grad}


def _forward_model(
    subgraph: TrainableSubgraph,
    batch: dict[str, Tensor],
    lora: dict[str, Tensor],
    frozen: dict[str, Tensor],
) -> ir.Model:
    """The loss, with LoRA tensors as initialisers and all others as inputs."""
    own = {id(parameter): name for name, parameter in subgraph.named_parameters()}
    parameters = [own[id(parameter)] for parameter in subgraph.lora_parameters().values()]
    forward = _Forward(subgraph, list(batch), [*parameters, *frozen])
    with subgraph.family.traceable():
        model = onnx_model(forward, {**batch, **lora, **frozen}, [LOSS])
    inputs = {value.name: value for value in model.graph.inputs}
    for name, tensor in lora.items():
        model.graph.inputs.remove(inputs[name])
        inputs[name].const_value = ir.tensor(tensor, name=name)
        model.graph.register_initializer(inputs[name])
    # The exporter leaves out half of the shapes.
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
    cast_like_to_cast(model)
    conv1x1_to_matmul(model)
    partial_split_to_slice(model)
    # Before the last rewrite: afterwards it would remove the statistics, which nothing reads yet.
    RemoveUnusedNodesPass()(model)
    complete_layer_norm(model)
    return model


def _make_artifacts(
    model: ir.Model, lora: dict[str, Tensor], adamw: AdamW, directory: Path
) -> None:
    from onnxruntime.training import artifacts, onnxblock

    optimizer = onnxblock.optim.AdamW(
        betas=(adamw.beta1, adamw.beta2),
        eps=adamw.eps,
        weight_decay=adamw.weight_decay,
        clip_grad=onnxblock.optim.ClipGradNorm(adamw.max_grad_norm),
    )
    with _quiet():
        artifacts.generate_artifacts(
            ir.to_proto(model),
            requires_grad=list(lora),
            optimizer=optimizer,
            artifact_directory=directory,
        )
    path = directory / TRAINING_MODEL
    written = ir.load(path)
    if depthwise_grad_to_conv(written):
        ir.save(written, path)
    path = directory / OPTIMIZER_MODEL
    written = ir.load(path)
    # generate_artifacts stamps the installed onnx's IR version, which its own runtime refuses.
    written.ir_version = min(written.ir_version, IR)
    expand_clip_grad_norm(written, len(lora))
    for node in written.graph:
        if "adam_mode" in node.attributes:
            # Decay before the step, as torch.optim.AdamW; 1 is after it.
            node.attributes.add(ir.AttrInt64("adam_mode", 0))
    if adamw.loraplus_lr_ratio != 1:
        rate_of_b(written, _rank(lora), adamw.loraplus_lr_ratio)
    ir.save(written, path)


def _rank(lora: dict[str, Tensor]) -> int:
    """Rows of every LoRA A.

    Raises:
        BadInput: a B has as many, so that the optimizer could not tell it from A.
    """
    (rank,) = {len(tensor) for name, tensor in lora.items() if not is_b(name)}
    if alike := [name for name, tensor in lora.items() if is_b(name) and len(tensor) == rank]:
        raise BadInput(
            "train.loraplus_lr_ratio",
            found=f"{alike[0]} with {rank} rows, as many as the rank",
            expected="fewer or more rows: the ort-training target tells A from B by them",
            remedy="take another rank, another target, or loraplus_lr_ratio = 1",
        )
    return rank


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what onnxruntime's C++ writes to stderr: one line per graph transformer, whatever the
    severity of its logger. Its errors are exceptions.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
