"""What training a sub-graph takes, from shapes alone: the model lies on the meta device.

Activations are what autograd keeps of one forward pass with attention in its math form, as the
exported graphs compute it; operations are counted over forward and backward. Blocks of one kind
take the same, so each kind is measured once and a sub-graph is a sum: a planner may ask for many.
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
from edge_dit.errors import ManyFaults
from edge_dit.models.checkpoint import meta_model
from edge_dit.models.families import family_of
from edge_dit.models.families.family import Family, Grid, State
from edge_dit.models.public_configs import public_config
from edge_dit.models.subgraph import (
    TrainableSubgraph,
    add_lora,
    as_batch,
    inner_runs,
    lora_modules,
    remove_lora,
)
from edge_dit.planning.plan import Plan, model_of
from edge_dit.planning.split import SplitRequest, choose_split, size_faults

FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Cost:
    """Of one training step with batch 1, float32.

    Attributes:
        blocks: trained blocks.
        parameters: of these blocks and the head, frozen, without LoRA.
        lora: LoRA parameters.
        frozen_bytes: of the frozen parameters.
        lora_bytes: of the LoRA parameters and their gradients.
        optimizer_bytes: of AdamW's two moments.
        activation_bytes: kept for the backward pass.
        largest_bytes: of the largest tensor among those.
        turned_bytes: of frozen weights that gradients pass, and are multiplied with once more.
        widest_bytes: of the largest of those.
        matrix_bytes: of the blocks' largest frozen tensor.
        bank_bytes: of one stored draw; what a bank stores once per prompt is not counted.
        flops: forward and backward, a multiply-add counting as two.
    """

    blocks: int
    parameters: int
    lora: int
    frozen_bytes: int
    lora_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    largest_bytes: int
    turned_bytes: int
    widest_bytes: int
    matrix_bytes: int
    bank_bytes: int
    flops: int

    @property
    def total_bytes(self) -> int:
        """What a training step needs in memory at least; the bank stays on disk."""
        return self.frozen_bytes + self.lora_bytes + self.optimizer_bytes + self.activation_bytes


class _Step(NamedTuple):
    """Of a step: bytes kept for the backward pass, operations of both passes, elements of frozen
    weights that gradients pass, bytes of the largest kept tensor, elements of the largest of those
    weights.
    """

    kept: int
    flops: int
    turned: int
    largest: int
    widest: int


def parameters(family: Family, config: dict[str, Any]) -> int:
    """Parameters of the whole transformer."""
    return sum(p.numel() for p in meta_model(family, config).parameters())


class Shapes:
    """A model's shapes, and what any choice of trained blocks takes.

    Args:
        family: of the model.
        config: of the transformer.
        grid: token rows and columns of a patch.
        text: text tokens.
        targets: modules within a block that carry LoRA; default the family's.
    """

    def __init__(
        self,
        family: Family,
        config: dict[str, Any],
        grid: Grid,
        text: int,
        targets: Sequence[str] | None = None,
    ) -> None:
        self.family, self.grid = family, grid
        self.targets = tuple(targets or family.lora_targets)
        self.model: Any = meta_model(family, config)
        self.blocks = list(family.blocks(self.model).values())
        with torch.device("meta"):
            self.latents, prompt = family.blank(self.model, grid, text)
            inputs = family.inputs(self.model, self.latents, 500.0, prompt, grid)
            self.entry, self.cond = family.begin(self.model, inputs)
        kinds: dict[Any, int] = {}
        self.kinds = [kinds.setdefault(_kind(block), len(kinds)) for block in self.blocks]
        """Number of each block's kind."""
        self._measured: dict[tuple[int, ...], _Step] = {}
        self._lora: dict[tuple[int, bool], int] = {}

    def cost(self, trained: Sequence[int], rank: int) -> Cost:
        """What training some blocks takes.

        Args:
            trained: their numbers, ascending.
            rank: of the LoRA.
        """
        lora = rank * self._lora_sides(trained)
        frozen = self._head_parameters + sum(self._parameters[number] for number in trained)
        step = self._step(trained, rank)
        stored = self._stored + len(inner_runs(trained)) * self.border_bytes // FLOAT
        return Cost(
            blocks=len(trained),
            parameters=frozen,
            lora=lora,
            frozen_bytes=FLOAT * frozen,
            lora_bytes=2 * FLOAT * lora,
            optimizer_bytes=2 * FLOAT * lora,
            activation_bytes=step.kept,
            largest_bytes=step.largest,
            turned_bytes=FLOAT * step.turned,
            widest_bytes=FLOAT * step.widest,
            matrix_bytes=FLOAT * max(self._matrices[number] for number in trained),
            bank_bytes=FLOAT * stored,
            flops=step.flops,
        )

    @property
    def border_bytes(self) -> int:
        """Of the state between two blocks."""
        return FLOAT * sum(value.numel() for value in self.entry if value is not None)

    @cached_property
    def _stored(self) -> int:
        """Elements of a draw that has no residuals but the tail's."""
        shared = {f"cond.{name}" for name in self.family.per_prompt}
        return sum(v.numel() for name, v in self._batch({}).items() if name not in shared)

    @cached_property
    def _parameters(self) -> list[int]:
        return [sum(p.numel() for p in block.parameters()) for block in self.blocks]

    @cached_property
    def _matrices(self) -> list[int]:
        return [max(p.numel() for p in block.parameters()) for block in self.blocks]

    @cached_property
    def _head_parameters(self) -> int:
        found = [getattr(self.model, name) for name in self.family.head_modules]
        tensors = [[m] if isinstance(m, Tensor) else list(m.parameters()) for m in found]
        return sum(p.numel() for group in tensors for p in group)

    def _lora_sides(self, trained: Sequence[int]) -> int:
        """Inputs and outputs of the modules that carry LoRA: its parameters at rank 1."""
        return self._sides(trained[-1], True) + sum(self._sides(n, False) for n in trained[:-1])

    def _sides(self, number: int, last: bool) -> int:
        key = (self.kinds[number], last)
        if key not in self._lora:
            # Behind any other block it is not the last.
            blocks = [number] if last else [number, (number + 1) % len(self.blocks)]
            inside = list(self.family.blocks(self.model))[number] + "."
            names = lora_modules(self.family, self.model, blocks, self.targets)
            modules = [self.model.get_submodule(n) for n in names if n.startswith(inside)]
            self._lora[key] = sum(sum(module.weight.shape[:2]) for module in modules)
        return self._lora[key]

    def _batch(self, inner: dict[int, State]) -> dict[str, Tensor]:
        residual, target = torch.zeros_like(self.entry.image), torch.zeros_like(self.latents)
        return as_batch(self.entry, residual, self.cond, target, inner=inner)

    def _step(self, trained: Sequence[int], rank: int) -> _Step:
        """What a step takes.

        The first trained block keeps less, for no gradient leaves it; the last comes with head and
        loss. Both show in sub-graphs of one and of two blocks, and longer ones are chains of those:
        their sum over neighbours, less what the blocks between were counted twice.
        """
        pairs = list(pairwise(trained)) or [(trained[0],)]
        chain = [self._measure(pair, rank) for pair in pairs]
        twice = [self._measure((number,), rank) for number in trained[1:-1]]
        kept, flops, turned = (
            sum(c[i] for c in chain) - sum(t[i] for t in twice) for i in (0, 1, 2)
        )
        largest, widest = (max(one[i] for one in chain) for i in (3, 4))
        return _Step(kept, flops, turned, largest, widest)

    def _measure(self, trained: tuple[int, ...], rank: int) -> _Step:
        key = (rank, *(self.kinds[number] for number in trained))
        if key not in self._measured:
            chosen = lora_modules(self.family, self.model, trained, self.targets)
            inner = dict.fromkeys(inner_runs(trained).values(), self.entry)
            with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), self.family.traceable():
                add_lora(self.model, chosen, rank, float(rank), seed=0)
                subgraph = TrainableSubgraph(self.model, self.family, trained, self.grid)
                self._measured[key] = _measure(subgraph, self._batch(inner))
            remove_lora(self.model)
        return self._measured[key]


def _kind(block: torch.nn.Module) -> tuple[Any, ...]:
    return type(block), *((name, tuple(p.shape)) for name, p in block.named_parameters())


def cost_of_plan(plan: Plan) -> dict[str, Cost]:
    """Full LoRA at full resolution, and ``plan``."""
    model = model_of(plan, check=False)
    side = plan.s_max // plan.multiple
    return _against_full_lora(
        model.family,
        model.config,
        plan.layers,
        plan.trained,
        ((side, side), plan.grid),
        plan.text_tokens,
        plan.rank,
        plan.lora_targets,
    )


def cost_of_config(
    name: str,
    skip_ratio: float | None = None,
    head_skip: int | None = None,
    tail_skip: int | None = None,
    patch: int | None = None,
    rank: int = 16,
) -> tuple[dict[str, Any], dict[str, Cost]]:
    """What a public checkpoint would take: facts with a "summary" in words, and the costs of full
    LoRA at full resolution and of the split.

    Args:
        name: key of `edge_dit.models.public_configs.CONFIGS`.
        skip_ratio: share of blocks to skip; default one half.
        head_skip: overrides the split's n.
        tail_skip: overrides the split's m.
        patch: s_min in pixels; default the paper's, else half the resolution.
        rank: of the LoRA.

    Raises:
        BadInput: an unknown name, a patch that does not divide, or no block left to train.
    """
    public = public_config(name)
    family, config = family_of(public.family), public.config
    layers = len(family.block_names(config))
    split = choose_split(layers, SplitRequest(skip_ratio, head_skip, tail_skip))
    head, tail, faults = split.head_skip, split.tail_skip, split.faults
    patch = public.patch if patch is None else patch
    faults += size_faults({"--patch": patch}, public.multiple)
    if faults:
        raise faults[0] if len(faults) == 1 else ManyFaults("plan", faults)
    whole, side = public.resolution // public.multiple, patch // public.multiple
    grids = ((whole, whole), (side, side))
    columns = _against_full_lora(
        family, config, layers, range(head, layers - tail), grids, public.text_tokens, rank, None
    )
    total = parameters(family, config)
    words = (
        f"{name}: {_count(total)} parameters in {layers} blocks and the rest; train blocks "
        f"{head}..{layers - tail - 1}, patches {patch} px out of {public.resolution} px, "
        f"{public.text_tokens} text tokens, LoRA rank {rank}"
    )
    facts = {
        "summary": words,
        "config": name,
        "family": public.family,
        "parameters": total,
        "layers": layers,
        "head_skip": head,
        "tail_skip": tail,
        "patch": patch,
        "resolution": public.resolution,
        "text_tokens": public.text_tokens,
        "rank": rank,
        "cost": {heading: vars(column) for heading, column in columns.items()},
    }
    return facts, columns


def _against_full_lora(
    family: Family,
    config: dict[str, Any],
    layers: int,
    trained: Sequence[int],
    grids: tuple[Grid, Grid],
    text: int,
    rank: int,
    targets: Sequence[str] | None,
) -> dict[str, Cost]:
    whole, patch = grids
    full = Shapes(family, config, whole, text, targets)
    own = full if patch == whole else Shapes(family, config, patch, text, targets)
    return {
        "full LoRA": full.cost(range(layers), rank),
        "this plan": own.cost(trained, rank),
    }


def _measure(subgraph: TrainableSubgraph, batch: dict[str, Tensor]) -> _Step:
    """A step's measures, by running it on the meta device."""
    not_activations = [*subgraph.parameters(), *subgraph.buffers(), *batch.values()]
    known = {_storage(tensor) for tensor in not_activations}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            kept[_storage(tensor)] = tensor
        return tensor

    turned: dict[int, int] = {}

    def passed(module: torch.nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() < 2 or weight.requires_grad:
            return
        if inputs[0].requires_grad:
            turned[id(module)] = weight.numel()

    hooks = [m.register_forward_hook(passed) for m in subgraph.modules() if not [*m.children()]]
    counter = FlopCounterMode(display=False)
    with counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = subgraph(batch)
        loss.backward()
    for hook in hooks:
        hook.remove()
    sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
    flops, weights = counter.get_total_flops(), list(turned.values())
    return _Step(sum(sizes), flops, sum(weights), max(sizes), max(weights, default=0))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def table(columns: dict[str, Cost]) -> list[str]:
    """The costs side by side, as lines of text.

    Args:
        columns: heading -> cost; the last is compared with the first.
    """
    rows: list[tuple[str, list[str]]] = [
        ("trained blocks", [str(c.blocks) for c in columns.values()]),
        ("parameters kept", [_count(c.parameters) for c in columns.values()]),
        ("LoRA parameters", [_count(c.lora) for c in columns.values()]),
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


def _count(number: int) -> str:
    return f"{number / 1e9:.3f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _flops(number: int) -> str:
    return f"{number / 1e12:.2f} TFLOP" if number >= 1e11 else f"{number / 1e9:.2f} GFLOP"


def _bytes(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.2f} MiB"
