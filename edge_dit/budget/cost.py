"""Parameters, bytes and operations of one training step, computed from shapes alone.

The model lies on the meta device, so no weights are needed. Activations are the tensors that
autograd saves in one forward pass; attention runs in its math form, because the exported graphs
compute it so. Operations are counted over the forward and the backward pass.

Blocks with the same parameter shapes cost the same. So each kind of block is measured once, and the
cost of a sub-graph is a sum. A search can therefore ask for thousands of sub-graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edge_dit import text as plain
from edge_dit.contract.names import AT_HEAD, FRESH, MOMENTS, STATE, STORED, THROUGH, Tail, read_in
from edge_dit.models.checkpoint import meta_model
from edge_dit.models.families.family import Conditioning, Family, Grid, State
from edge_dit.models.public_configs import PublicConfig
from edge_dit.models.subgraph import (
    TrainableSubgraph,
    add_lora,
    as_batch,
    inner_runs,
    lora_modules,
    remove_lora,
)
from edge_dit.planning.plan import Plan, model_of

FLOAT = 4
"""Bytes of a float32 element."""


@dataclass(frozen=True)
class Cost:
    """Cost of one training step with batch 1 in float32.

    Attributes:
        blocks: number of trained blocks.
        parameters: frozen parameters of the blocks that run and of the head.
        lora: LoRA parameters.
        frozen_bytes: bytes of the frozen parameters.
        lora_bytes: bytes of the LoRA parameters and their gradients.
        optimizer_bytes: bytes of the moments that AdamW keeps.
        activation_bytes: bytes that autograd saves for the backward pass.
        largest_activation_bytes: bytes of the largest of these tensors.
        transposed_bytes: bytes of the frozen weights that a gradient passes through. The backward
            pass multiplies by their transposes.
        largest_transposed_bytes: bytes of the largest of these weights.
        largest_weight_bytes: bytes of the largest frozen tensor of the blocks that run.
        bank_bytes: bytes of one stored draw, without what a bank stores once for each prompt.
        flops: floating-point operations of both passes. A multiply-add counts as two.

    Blocks of a tail that runs are in all of these but ``blocks``.
    """

    blocks: int
    parameters: int
    lora: int
    frozen_bytes: int
    lora_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    largest_activation_bytes: int
    transposed_bytes: int
    largest_transposed_bytes: int
    largest_weight_bytes: int
    bank_bytes: int
    flops: int

    @property
    def total_bytes(self) -> int:
        """Least memory of a training step, bytes. The bank is not counted: it stays on disk."""
        return self.frozen_bytes + self.lora_bytes + self.optimizer_bytes + self.activation_bytes


class _Step(NamedTuple):
    """One training step, as `_measure` ran it on the meta device.

    Attributes:
        saved: bytes that autograd saves for the backward pass.
        flops: operations of both passes.
        transposed: elements of the frozen weights that a gradient passes through.
        largest_saved: bytes of the largest saved tensor.
        largest_transposed: elements of the largest of these weights.
    """

    saved: int
    flops: int
    transposed: int
    largest_saved: int
    largest_transposed: int


def parameters(model: torch.nn.Module) -> int:
    """Number of parameters of the whole transformer."""
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class Windows:
    """Patches that are windows, whose positions are stored with each draw.

    Attributes:
        whole: tokens of the picture's side.
        surroundings: whether blocks are given what is around a window.
    """

    whole: int
    surroundings: bool


class Shapes:
    """The shapes of a model at one patch size; gives the cost of any choice of trained blocks.

    Args:
        family: the model's family.
        model: the transformer on the meta device (`meta_model`); several patch sizes can share it.
        grid: token rows and columns of a patch.
        text: number of text tokens.
        targets: modules within a block that carry LoRA; default the family's.
        moments: how many the optimizer keeps of each parameter.
        windows: what they are windows of, if patches are windows.
    """

    def __init__(
        self,
        family: Family,
        model: torch.nn.Module,
        grid: Grid,
        text: int,
        targets: Sequence[str] | None = None,
        moments: int = len(MOMENTS),
        windows: Windows | None = None,
    ) -> None:
        self.family, self.grid, self.moments = family, grid, moments
        self.targets = tuple(targets or family.lora_targets)
        self.model: Any = model
        self.names, self.blocks = map(list, zip(*family.blocks(self.model).items(), strict=True))
        with torch.device("meta"), family.traceable():
            self.latents, prompt = family.blank(self.model, grid, text)
            inputs = family.inputs(self.model, self.latents, 500.0, prompt, grid)
            self.entry, self.cond = family.begin(self.model, inputs)
            if windows and windows.surroundings:
                outside = family.blank_surroundings(self.model, self.names, grid[0], windows.whole)
                self.cond = {**self.cond, **outside}
        self._per_prompt = family.by_prompt(windows is not None)
        kinds: dict[Any, int] = {}
        self.kinds = [kinds.setdefault(_kind(block), len(kinds)) for block in self.blocks]
        """The kind of each block, by block number. Blocks of one kind have the same shapes."""
        self._measured: dict[tuple[int, ...], _Step] = {}
        self._forwards: dict[int, _Step] = {}
        self._lora: dict[tuple[int, bool], int] = {}

    def cost(self, trained: Sequence[int], rank: int, tail: Tail = STORED) -> Cost:
        """Cost of a training step.

        Args:
            trained: numbers of the trained blocks, ascending.
            rank: LoRA rank.
            tail: what takes the place of the blocks after the last trained one.
        """
        after = self.after(trained, tail)
        lora = rank * self._lora_sides(trained, read=bool(after) and tail == THROUGH)
        running = [*trained, *after]
        frozen = self._head_parameters + sum(self._parameters[number] for number in running)
        step = self._step(trained, rank, tail)
        stored = self._stored(running) + len(inner_runs(trained)) * self.border_bytes // FLOAT
        if tail != STORED:
            stored -= self.entry.image.numel()
        return Cost(
            blocks=len(trained),
            parameters=frozen,
            lora=lora,
            frozen_bytes=FLOAT * frozen,
            lora_bytes=2 * FLOAT * lora,
            optimizer_bytes=self.moments * FLOAT * lora,
            activation_bytes=step.saved,
            largest_activation_bytes=step.largest_saved,
            transposed_bytes=FLOAT * step.transposed,
            largest_transposed_bytes=FLOAT * step.largest_transposed,
            largest_weight_bytes=FLOAT * max(self._largest_weights[number] for number in running),
            bank_bytes=FLOAT * stored,
            flops=step.flops,
        )

    def after(self, trained: Sequence[int], tail: Tail) -> range:
        """Numbers of the tail blocks that run after the trained ones."""
        return range(len(self.blocks) if tail == STORED else trained[-1] + 1, len(self.blocks))

    @property
    def border_bytes(self) -> int:
        """Bytes of the state between two blocks."""
        return FLOAT * sum(value.numel() for value in self.entry if value is not None)

    def _stored(self, running: Sequence[int]) -> int:
        """Elements of a stored draw whose only residual is the tail's.

        Args:
            running: numbers of the blocks that run.
        """
        read = read_in([*(self.names[number] for number in running), AT_HEAD], self.cond)
        each = (value for name, value in read.items() if name not in self._per_prompt)
        return self._states_and_target + sum(value.numel() for value in each)

    @cached_property
    def _states_and_target(self) -> int:
        """Elements of a stored draw without conditioning, whose only residual is the tail's."""
        return sum(value.numel() for value in self._batch({}, {}).values())

    @cached_property
    def _parameters(self) -> list[int]:
        return [sum(p.numel() for p in block.parameters()) for block in self.blocks]

    @cached_property
    def _largest_weights(self) -> list[int]:
        return [max(p.numel() for p in block.parameters()) for block in self.blocks]

    @cached_property
    def _head_parameters(self) -> int:
        parts = [getattr(self.model, name) for name in self.family.head_modules]
        tensors = [[part] if isinstance(part, Tensor) else part.parameters() for part in parts]
        return sum(tensor.numel() for group in tensors for tensor in group)

    def _lora_sides(self, trained: Sequence[int], read: bool) -> int:
        """Sum of in_features + out_features over the modules that carry LoRA. This is the number of
        LoRA parameters at rank 1.

        Args:
            trained: numbers of the trained blocks, ascending.
            read: whether a gradient comes from the text output of the last one.
        """
        sides = sum(self._sides(number, False) for number in trained[:-1])
        return sides + self._sides(trained[-1], not read)

    def _sides(self, number: int, last: bool) -> int:
        key = (self.kinds[number], last)
        if key not in self._lora:
            # Any second block makes this one not the last.
            blocks = [number] if last else [number, (number + 1) % len(self.blocks)]
            inside = self.names[number] + "."
            names = lora_modules(self.family, self.model, blocks, self.targets)
            modules = [self.model.get_submodule(n) for n in names if n.startswith(inside)]
            self._lora[key] = sum(sum(module.weight.shape[:2]) for module in modules)
        return self._lora[key]

    def _batch(self, cond: Conditioning, inner: dict[int, State]) -> dict[str, Tensor]:
        residual, target = torch.zeros_like(self.entry.image), torch.zeros_like(self.latents)
        return as_batch(self.entry, residual, cond, target, inner=inner)

    def _step(self, trained: Sequence[int], rank: int, tail: Tail) -> _Step:
        """The step of a sub-graph, put together from sub-graphs of one and two blocks.

        The first trained block saves less, because no gradient leaves it. The last one that a
        gradient goes back through comes with the head and the loss, and nothing reads its text. So
        a longer sub-graph is the sum over its neighbouring pairs, less each inner block once,
        because two pairs count it. A fresh tail's forward passes are added.
        """
        after = self.after(trained, tail)
        chain = [*trained, *(after if tail == THROUGH else ())]
        lora = frozenset(trained)
        pairs = list(pairwise(chain)) or [(chain[0],)]
        parts = [self._measure(pair, lora, rank, place > 0) for place, pair in enumerate(pairs)]
        parts += [self._forward(number) for number in (after if tail == FRESH else ())]
        twice = [self._measure((number,), lora, rank, True) for number in chain[1:-1]]

        def total(field: str) -> int:
            inner = sum(getattr(step, field) for step in twice)
            return sum(getattr(step, field) for step in parts) - inner

        return _Step(
            saved=total("saved"),
            flops=total("flops"),
            transposed=total("transposed"),
            largest_saved=max(step.largest_saved for step in parts),
            largest_transposed=max(step.largest_transposed for step in parts),
        )

    def _measure(
        self, blocks: tuple[int, ...], lora: frozenset[int], rank: int, entered: bool
    ) -> _Step:
        """Blocks with head and loss, forward and backward.

        Args:
            blocks: their numbers, ascending.
            lora: numbers of the blocks that carry LoRA.
            rank: of it.
            entered: whether a gradient leaves the first block.
        """
        own = [number for number in blocks if number in lora]
        key = (rank, entered, len(own), *(self.kinds[number] for number in blocks))
        if key not in self._measured:
            self.model.requires_grad_(False)
            tail = STORED if blocks[-1] in lora else THROUGH
            chosen = lora_modules(self.family, self.model, own, self.targets, tail) if own else []
            inner = dict.fromkeys(inner_runs(blocks).values(), self.entry)
            with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), self.family.traceable():
                if chosen:
                    add_lora(self.model, chosen, rank, float(rank), seed=0)
                subgraph = TrainableSubgraph(self.model, self.family, blocks, self.grid)
                batch = self._batch(subgraph.reads(self.cond), inner)
                for name in STATE if entered else ():
                    if name in batch:
                        batch[name] = batch[name].clone().requires_grad_()
                self._measured[key] = _measure(subgraph, batch)
            remove_lora(self.model)
        return self._measured[key]

    def _forward(self, number: int) -> _Step:
        """The forward pass of a block, which saves nothing."""
        kind, counter = self.kinds[number], FlopCounterMode(display=False)
        if kind not in self._forwards:
            with torch.no_grad(), torch.device("meta"), counter, self.family.traceable():
                block = self.names[number], self.blocks[number]
                self.family.run_block(*block, self.entry, self.cond, self.grid)
            self._forwards[kind] = _Step(0, counter.get_total_flops(), 0, 0, 0)
        return self._forwards[kind]


def _kind(block: torch.nn.Module) -> tuple[Any, ...]:
    return type(block), *((name, tuple(p.shape)) for name, p in block.named_parameters())


def shapes_of(plan: Plan) -> tuple[Shapes, Shapes]:
    """The shapes of a plan's model at full resolution, and at the patch size.

    Raises:
        BadInput: the model folder is gone.
    """
    model = model_of(plan, check=False)
    transformer = meta_model(model.family, model.config)

    def at(side: int) -> Shapes:
        return Shapes(
            model.family,
            transformer,
            (side // plan.multiple, side // plan.multiple),
            plan.text_tokens,
            plan.lora_targets,
            len(plan.optimizer.moments),
            Windows(plan.passing_grid[0], plan.surroundings and side == plan.s_min)
            if plan.window
            else None,
        )

    patch = at(plan.s_min)
    return (patch if plan.s_max == plan.s_min else at(plan.s_max)), patch


def cost_of_plan(plan: Plan) -> dict[str, Cost]:
    """Costs of full LoRA at full resolution and of ``plan``, by their headings for `table`."""
    whole, patch = shapes_of(plan)
    return _against_full_lora(whole, patch, plan.trained, plan.rank, plan.tail)


def cost_of_public(
    public: PublicConfig, trained: Sequence[int], patch: int, rank: int
) -> tuple[int, dict[str, Cost]]:
    """Parameters of a public checkpoint's transformer, and the costs of full LoRA at full
    resolution and of some trained blocks, by their headings for `table`.

    Args:
        public: the checkpoint.
        trained: numbers of the trained blocks, ascending.
        patch: s_min in pixels, a multiple of the checkpoint's.
        rank: LoRA rank.
    """
    family = public.resolved()
    model = meta_model(family, public.config)
    whole, own = (
        Shapes(family, model, (tokens, tokens), public.text_tokens)
        for tokens in (public.resolution // public.multiple, patch // public.multiple)
    )
    return parameters(model), _against_full_lora(whole, own, trained, rank)


def _against_full_lora(
    whole: Shapes, patch: Shapes, trained: Sequence[int], rank: int, tail: Tail = STORED
) -> dict[str, Cost]:
    """Costs of LoRA on all blocks at full resolution (``whole``) and of the trained blocks at the
    patch size (``patch``).
    """
    return {
        "full LoRA": whole.cost(range(len(whole.blocks)), rank),
        "this plan": patch.cost(trained, rank, tail),
    }


def _measure(subgraph: TrainableSubgraph, batch: dict[str, Tensor]) -> _Step:
    """Run one step on the meta device and count."""
    not_activations = [*subgraph.parameters(), *subgraph.buffers(), *batch.values()]
    known = {_storage(tensor) for tensor in not_activations}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            saved[_storage(tensor)] = tensor
        return tensor

    transposed: dict[int, int] = {}

    def note_weight(module: torch.nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() < 2 or weight.requires_grad:
            return
        if inputs[0].requires_grad:
            transposed[id(module)] = weight.numel()

    leaves = [module for module in subgraph.modules() if not [*module.children()]]
    hooks = [module.register_forward_hook(note_weight) for module in leaves]
    counter = FlopCounterMode(display=False)
    with counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = subgraph(batch)
        loss.backward()
    for hook in hooks:
        hook.remove()
    sizes = [tensor.untyped_storage().nbytes() for tensor in saved.values()]
    return _Step(
        saved=sum(sizes),
        flops=counter.get_total_flops(),
        transposed=sum(transposed.values()),
        largest_saved=max(sizes),
        largest_transposed=max(transposed.values(), default=0),
    )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def table(columns: dict[str, Cost]) -> list[str]:
    """Lines of a text table, one column for each cost.

    Args:
        columns: heading -> cost. The last line compares the last cost with the first.
    """
    rows: list[tuple[str, list[str]]] = [
        ("trained blocks", [str(c.blocks) for c in columns.values()]),
        ("parameters kept", [count_in_words(c.parameters) for c in columns.values()]),
        ("LoRA parameters", [count_in_words(c.lora) for c in columns.values()]),
        ("frozen weights", [_bytes(c.frozen_bytes) for c in columns.values()]),
        ("LoRA and gradients", [_bytes(c.lora_bytes) for c in columns.values()]),
        ("optimizer", [_bytes(c.optimizer_bytes) for c in columns.values()]),
        ("activations", [_bytes(c.activation_bytes) for c in columns.values()]),
        ("together, float32", [_bytes(c.total_bytes) for c in columns.values()]),
        ("bank, per draw", [_bytes(c.bank_bytes) for c in columns.values()]),
        ("operations per step", [_flops(c.flops) for c in columns.values()]),
    ]
    lines = plain.columns(list(columns), rows)
    first, *_, last = columns.values()
    lines.append(
        f"memory {last.total_bytes / first.total_bytes - 1:+.0%}, "
        f"operations {last.flops / first.flops - 1:+.0%}"
    )
    return lines


def count_in_words(number: int) -> str:
    """A number of parameters, in billions or millions."""
    return f"{number / 1e9:.3f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _flops(number: int) -> str:
    return f"{number / 1e12:.2f} TFLOP" if number >= 1e11 else f"{number / 1e9:.2f} GFLOP"


def _bytes(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.2f} MiB"
