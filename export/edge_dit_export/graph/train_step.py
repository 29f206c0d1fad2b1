"""Trace one training step - loss and LoRA gradients - of a sub-graph into one flat ATen graph.

The graph is the common source of the plain ONNX and the ExecuTorch step. It is traced with
``make_fx`` through ``torch.autograd.grad`` and decomposed to core ATen, so a runtime needs no
autograd of its own:

    batch tensors, LoRA tensors  ->  loss, one gradient per LoRA tensor

Frozen weights are buffers of the graph module, LoRA tensors are inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, fx
from torch.func import functional_call

from edge_dit.contract.names import ENTRY, GRAD, LOSS, STATE
from edge_dit.models.subgraph import TrainableSubgraph, lora_name
from edge_dit_export.graph.blocks import Block, Head, frozen_tensors
from edge_dit_export.graph.trace import TracedStep, trace

FROZEN = "frozen."
"""Prefix of the frozen weights' names among the traced inputs."""


def trace_train_step(
    subgraph: TrainableSubgraph, batch: dict[str, Tensor], recompute: bool = False
) -> TracedStep:
    """Trace ``subgraph``'s loss and gradients for tensors shaped like ``batch``.

    Args:
        subgraph: float32, LoRA in place.
        batch: one draw, as `TrainableSubgraph.forward` takes it; only the shapes matter.
        recompute: between the passes keep only the states between blocks; the backward pass
            computes each block again.

    Returns:
        inputs: the batch (see `TrainableSubgraph.forward`), then the LoRA tensors by diffusers
        name; outputs: "loss", then "grad.<lora name>" in the order of the LoRA inputs.
    """
    lora = {name: p.detach().clone() for name, p in subgraph.lora_parameters().items()}
    if recompute:
        return _trace_recomputing(subgraph, batch, lora)
    parameter_of = _parameter_names(subgraph)
    frozen = {
        name: tensor.detach()
        for name, tensor in [*subgraph.named_parameters(), *subgraph.named_buffers()]
        if not tensor.requires_grad
    }

    def step(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        leaves = {name: tensors[name].requires_grad_() for name in lora}
        with torch.enable_grad():
            state = {parameter_of[name]: tensor for name, tensor in leaves.items()}
            state |= {name: tensors[FROZEN + name] for name in frozen}
            loss = functional_call(subgraph, state, ({name: tensors[name] for name in batch},))
            gradients = torch.autograd.grad(loss, list(leaves.values()))
        return loss.detach(), *gradients

    return _traced(step, subgraph, batch, lora, frozen)


def _trace_recomputing(
    subgraph: TrainableSubgraph, batch: dict[str, Tensor], lora: dict[str, Tensor]
) -> TracedStep:
    blocks = [Block(subgraph, name) for name in (*subgraph.order, *subgraph.after)]
    differentiated = blocks[: len(subgraph.differentiated())]
    head = Head(subgraph)
    frozen = frozen_tensors(subgraph)

    def own(block: Block, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = {n: tensors[f"{FROZEN}{block.name}.{n}"] for n in block.weights}
        return weights | {n: tensors[lora_name(f"{block.name}.{n}")] for n in block.lora}

    def step(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        borders = [{name: tensors[name] for name in STATE if name in tensors}]
        conditioning = {n: tensor for n, tensor in tensors.items() if n.startswith("cond.")}
        for block in blocks:
            borders[-1] = block.arrive(borders[-1], tensors)
            cond = _only_after(borders[-1].values(), conditioning)
            after = block.forward({**tensors, **own(block, tensors), **cond, **borders[-1]})
            borders.append(dict(zip(STATE, after, strict=False)))
        weights = {n: tensors[FROZEN + n] for n in head.weights}
        loss, given = head.backward({**tensors, **weights, **borders[-1]})
        gradients = {GRAD + ENTRY: given}
        done = [given]
        lora_gradients: dict[str, Tensor] = {}
        for block, border in reversed(list(zip(differentiated, borders, strict=False))):
            again = _only_after(done, {**conditioning, **border})
            done = list(block.backward({**tensors, **own(block, tensors), **again, **gradients}))
            gradients = {GRAD + n: g for n, g in zip(border, done, strict=False)}
            names = [lora_name(f"{block.name}.{n}") for n in block.lora]
            lora_gradients |= dict(zip(names, done[len(border) :], strict=True))
        return loss, *(lora_gradients[name] for name in lora)

    return _traced(step, subgraph, batch, lora, frozen)


def _only_after(done: Iterable[Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors``, each plus zero times an element of every tensor that must be computed before it.

    A runtime runs nodes in any order that their inputs allow. It would project the text for all
    blocks at once, merge a recomputed block with the first computation, or leave the LoRA gradients
    to the end, and keep in memory all that these need.
    """
    zero = 0.0 * torch.cat([tensor.reshape(-1)[:1] for tensor in done]).sum()
    return {name: tensor + zero for name, tensor in tensors.items()}


def _traced(
    step: Callable[[dict[str, Tensor]], tuple[Tensor, ...]],
    subgraph: TrainableSubgraph,
    batch: dict[str, Tensor],
    lora: dict[str, Tensor],
    frozen: dict[str, Tensor],
) -> TracedStep:
    inputs = {**batch, **lora}
    everything = {**inputs, **{FROZEN + name: tensor for name, tensor in frozen.items()}}
    module = trace(step, everything, subgraph.family)
    _to_buffers(module, frozen)
    return TracedStep(module, inputs, [LOSS, *(GRAD + name for name in lora)])


def _parameter_names(subgraph: TrainableSubgraph) -> dict[str, str]:
    """Diffusers LoRA name -> parameter name within the sub-graph."""
    own = {id(parameter): name for name, parameter in subgraph.named_parameters()}
    return {name: own[id(parameter)] for name, parameter in subgraph.lora_parameters().items()}


def _to_buffers(module: fx.GraphModule, frozen: dict[str, Tensor]) -> None:
    """Turn the trailing inputs, the frozen weights, into buffers, in place."""
    graph = module.graph
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


def run(step: TracedStep, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the traced step eagerly; outputs by name."""
    with torch.no_grad():
        values = step.module(*(inputs[name] for name in step.inputs))
    return dict(zip(step.outputs, values, strict=True))
