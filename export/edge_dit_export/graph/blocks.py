"""A sub-graph in pieces: each block, and the head after them, as functions of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from edge_dit.contract.names import (
    COND,
    ENTRY,
    ENTRY_TEXT,
    FRESH,
    GRAD,
    STATE,
    TAIL_RESIDUAL,
    read_by,
)
from edge_dit.models.families.family import State
from edge_dit.models.subgraph import TrainableSubgraph, conditioning_of


def plain_name(parameter: str) -> str:
    """The model's own name of a parameter below PEFT's wrapping."""
    return parameter.replace(".base_layer.", ".")


def frozen_tensors(subgraph: TrainableSubgraph) -> dict[str, Tensor]:
    """Frozen parameters and buffers of a sub-graph, by their names in the model."""
    state = [*subgraph.named_parameters(), *subgraph.named_buffers()]
    return {plain_name(n): t.detach() for n, t in state if not t.requires_grad}


class Block:
    """One block as functions of tensors: a trained one, or one of the tail, which has no LoRA.

    Args:
        subgraph: the sub-graph that holds the block.
        name: the block's name in the model.

    Attributes:
        states: those of `STATE` that something reads after the block. Nothing reads the text after
            the last block that runs.
        graded: those of them that a gradient comes from.
    """

    def __init__(self, subgraph: TrainableSubgraph, name: str) -> None:
        self.subgraph, self.name = subgraph, name
        self.module = subgraph.get_submodule(name)
        both = STATE if subgraph.family.joint else (ENTRY,)
        self.states = (ENTRY,) if name == [*subgraph.order, *subgraph.after][-1] else both
        constant = subgraph.tail == FRESH and name == subgraph.order[-1]
        self.graded = (ENTRY,) if constant else self.states
        state = [*self.module.named_parameters(), *self.module.named_buffers()]
        self.own = {_local(n): n for n, _ in state}
        self.lora = {_local(n): t.detach() for n, t in state if t.requires_grad}
        self.weights = {_local(n): t.detach() for n, t in state if not t.requires_grad}

    def kind(self) -> tuple[Any, ...]:
        """A key that is equal for blocks that can share graphs."""
        shapes = [(n, tuple(t.shape)) for n, t in {**self.weights, **self.lora}.items()]
        return type(self.module), self.states, self.graded, *shapes

    def cond(self, batch: Iterable[str]) -> dict[str, str]:
        """Conditioning that the block reads, by its graphs' names -> by the batch's.

        Args:
            batch: names of all tensors.
        """
        full = conditioning_of({name: name for name in batch})
        return {COND + local: name for local, name in read_by(self.name, full).items()}

    def renamed(self, batch: Iterable[str]) -> dict[str, str]:
        """Those of `cond` whose two names differ."""
        return {local: name for local, name in self.cond(batch).items() if local != name}

    def run(self, tensors: Mapping[str, Tensor]) -> State:
        """The state after the block.

        Args:
            tensors: the state before it, conditioning by the names of `cond` or by those of the
                batch, and the block's weights and LoRA by the names of `weights` and `lora`.
        """
        cond = conditioning_of(tensors)
        state = State(tensors[ENTRY], tensors.get(ENTRY_TEXT))
        own = {f"block.{self.own[name]}": tensors[name] for name in self.own}
        after = functional_call(_Running(self.subgraph, self.name), own, (state, cond))
        return State(after.image, after.text if ENTRY_TEXT in self.states else None)

    def arrive(
        self, after: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The state before this block, by `STATE`, from that after the trained block before it."""
        state = State(after[ENTRY], after.get(ENTRY_TEXT))
        moved = _tensors(self.subgraph.arrive(self.name, state, tensors))
        return dict(zip(STATE, moved, strict=False))

    def forward(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Image tokens [1, N, D] after the block, then text tokens [1, L, D] if it has any."""
        return _tensors(self.run(tensors))

    def backward(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Gradients of the state before the block, then of each LoRA tensor.

        Args:
            tensors: as `run` takes them, and "grad.<state>" for `graded`: gradients of the state
                after the block.
        """
        asked = [name for name in (*STATE, *self.lora) if name in tensors]
        leaves = {name: tensors[name].detach().requires_grad_() for name in asked}
        with torch.enable_grad():
            after = _tensors(self.run({**tensors, **leaves}))[: len(self.graded)]
            given = [tensors[GRAD + name] for name in self.graded]
            return torch.autograd.grad(after, list(leaves.values()), given)


class _Running(nn.Module):
    """A block of a sub-graph that runs, to be called with other tensors than its own."""

    def __init__(self, subgraph: TrainableSubgraph, name: str) -> None:
        super().__init__()
        self.block = subgraph.get_submodule(name)
        self.run = [subgraph.run]  # in a list, so that the sub-graph is no sub-module
        self.name = name

    def forward(self, state: State, cond: Mapping[str, Tensor]) -> State:
        return self.run[0](self.name, state, cond)


def _local(parameter: str) -> str:
    return plain_name(parameter).replace(".default.weight", ".weight")


def _tensors(state: State) -> tuple[Tensor, ...]:
    return (state.image,) if state.text is None else (state.image, state.text)


class Head:
    """What follows the last block: head and loss.

    Args:
        subgraph: the sub-graph that holds the head.
    """

    def __init__(self, subgraph: TrainableSubgraph) -> None:
        self.subgraph = subgraph
        blocks = tuple(f"{name}." for name in (*subgraph.order, *subgraph.after))
        frozen = frozen_tensors(subgraph)
        self.weights = {n: t for n, t in frozen.items() if not n.startswith(blocks)}

    def backward(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The loss, and its gradient with respect to the last block's image tokens "entry"."""
        image = tensors[ENTRY].detach().requires_grad_()
        with torch.enable_grad():
            own = {f"subgraph.{name}": tensors[name] for name in self.weights}
            loss = functional_call(_Head(self.subgraph), own, (tensors, image))
            return loss.detach(), *torch.autograd.grad(loss, [image])


class _Head(nn.Module):
    """Head and loss of a sub-graph, from the image tokens after the last block that runs."""

    def __init__(self, subgraph: TrainableSubgraph) -> None:
        super().__init__()
        self.subgraph = subgraph

    def forward(self, batch: dict[str, Tensor], image: Tensor) -> Tensor:
        sub = self.subgraph
        last = image + batch[TAIL_RESIDUAL] if TAIL_RESIDUAL in batch else image
        return sub.loss(sub.family.head(sub, last, conditioning_of(batch), sub.grid), batch)
