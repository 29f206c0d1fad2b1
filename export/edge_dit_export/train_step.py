"""Trace one training step - loss and LoRA gradients - of a sub-graph into one flat ATen graph.

The graph is the common source of the plain ONNX and the ExecuTorch step. It is traced with
``make_fx`` through ``torch.autograd.grad`` and decomposed to core ATen, so a runtime needs no
autograd of its own:

    batch tensors, LoRA tensors  ->  loss, one gradient per LoRA tensor

Frozen weights are buffers of the graph module, LoRA tensors are inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen
from torch.nn.attention import SDPBackend, sdpa_kernel

from edge_dit.subgraph import TrainableSubgraph


@dataclass(frozen=True)
class TrainStepGraph:
    """A traced training step.

    Attributes:
        module: flat positional inputs, flat tuple of outputs; frozen weights are buffers.
        inputs: example value of every input by name, in the order of the placeholders: the batch
            (see `TrainableSubgraph.forward`), then the LoRA tensors by diffusers name.
        outputs: names in order: "loss", then "grad.<lora name>" in the order of the LoRA inputs.
    """

    module: fx.GraphModule
    inputs: dict[str, Tensor]
    outputs: list[str]


def trace_train_step(subgraph: TrainableSubgraph, batch: dict[str, Tensor]) -> TrainStepGraph:
    """Trace ``subgraph``'s loss and gradients for tensors shaped like ``batch``.

    Attention is traced in its math form: the fused kernels' backward exists in no runtime we
    export to (pytorch/executorch issue 12804).

    Args:
        subgraph: float32, LoRA in place.
        batch: one draw, as `TrainableSubgraph.forward` takes it; only the shapes matter.
    """
    lora = {name: p.detach().clone() for name, p in subgraph.lora_parameters().items()}
    parameter_of = _parameter_names(subgraph)
    frozen = {
        name: tensor.detach()
        for name, tensor in [*subgraph.named_parameters(), *subgraph.named_buffers()]
        if not tensor.requires_grad
    }

    def step(
        batch: dict[str, Tensor], lora: dict[str, Tensor], frozen: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        lora = {name: tensor.requires_grad_() for name, tensor in lora.items()}
        with torch.enable_grad():
            state = {**frozen, **{parameter_of[name]: tensor for name, tensor in lora.items()}}
            loss = functional_call(subgraph, state, (batch,))
            gradients = torch.autograd.grad(loss, list(lora.values()))
        return loss.detach(), *gradients

    with sdpa_kernel(SDPBackend.MATH):
        decompositions: Any = core_aten_decompositions()
        module = make_fx(step, decomposition_table=decompositions)(batch, lora, frozen)
    module = _flatten(module, frozen)
    inputs = {**batch, **lora}
    return TrainStepGraph(module, inputs, ["loss", *(f"grad.{name}" for name in lora)])


def _parameter_names(subgraph: TrainableSubgraph) -> dict[str, str]:
    """Diffusers LoRA name -> parameter name within the sub-graph."""
    own = {id(parameter): name for name, parameter in subgraph.named_parameters()}
    return {name: own[id(parameter)] for name, parameter in subgraph.lora_parameters().items()}


def _flatten(module: fx.GraphModule, frozen: dict[str, Tensor]) -> fx.GraphModule:
    """Drop the pytree wrapping of ``make_fx`` and turn the trailing frozen inputs into buffers."""
    graph = module.graph
    graph.set_codegen(CodeGen())
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, (name, tensor) in zip(placeholders[-len(frozen) :], frozen.items(), strict=True):
        if node.users:
            buffer = name.replace(".", "__")
            module.register_buffer(buffer, tensor)
            with graph.inserting_before(node):
                replacement = graph.get_attr(buffer)
            replacement.meta = dict(node.meta)
            node.replace_all_uses_with(replacement)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()
    return module


def run(step: TrainStepGraph, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the traced step eagerly; outputs by name."""
    with torch.no_grad():
        values = step.module(*(inputs[name] for name in step.inputs))
    return dict(zip(step.outputs, values, strict=True))
