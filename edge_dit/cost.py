"""What training a sub-graph takes, from shapes alone: the model lies on the meta device.

Activations are what autograd keeps of one forward pass with attention in its math form, as the
exported graphs compute it; operations are counted over forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edge_dit import text as plain
from edge_dit.checkpoint import meta_model
from edge_dit.configs import public_config
from edge_dit.errors import ManyFaults
from edge_dit.families import family_of
from edge_dit.families.family import Family, Grid
from edge_dit.plan import Plan, choose_split, size_faults
from edge_dit.subgraph import TrainableSubgraph, add_lora, as_batch, inner_runs, lora_modules

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
    bank_bytes: int
    flops: int

    @property
    def total_bytes(self) -> int:
        """What a training step needs in memory at least; the bank stays on disk."""
        return self.frozen_bytes + self.lora_bytes + self.optimizer_bytes + self.activation_bytes


def parameters(family: Family, config: dict[str, Any]) -> int:
    """Parameters of the whole transformer."""
    return sum(p.numel() for p in meta_model(family, config).parameters())


def cost(
    family: Family,
    config: dict[str, Any],
    trained: Sequence[int],
    grid: Grid,
    text: int,
    rank: int,
    targets: Sequence[str] | None = None,
) -> Cost:
    """What training some blocks takes.

    Args:
        family: of the model.
        config: of the transformer.
        trained: numbers of the trained blocks, ascending.
        grid: token rows and columns of a patch.
        text: text tokens.
        rank: of the LoRA.
        targets: modules within a block that carry LoRA; default the family's.
    """
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), family.traceable():
        model = meta_model(family, config)
        chosen = lora_modules(family, model, trained, targets or family.lora_targets)
        latents, prompt = family.blank(model, grid, text)
        inputs = family.inputs(model, latents, 500.0, prompt, grid)
        entry, cond = family.begin(model, inputs)
        add_lora(model, chosen, rank, float(rank), seed=0)
        subgraph = TrainableSubgraph(model, family.name, trained, grid)
        batch = as_batch(
            entry,
            torch.zeros_like(entry.image),
            cond,
            torch.zeros_like(latents),
            inner=dict.fromkeys(inner_runs(trained).values(), entry),
        )
        activations, flops = _measure(subgraph, batch)
    trainable = sum(p.numel() for p in subgraph.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in subgraph.parameters() if not p.requires_grad)
    shared = {f"cond.{name}" for name in family.per_prompt}
    stored = sum(value.numel() for name, value in batch.items() if name not in shared)
    return Cost(
        blocks=len(trained),
        parameters=frozen,
        lora=trainable,
        frozen_bytes=FLOAT * frozen,
        lora_bytes=2 * FLOAT * trainable,
        optimizer_bytes=2 * FLOAT * trainable,
        activation_bytes=activations,
        bank_bytes=FLOAT * stored,
        flops=flops,
    )


def cost_of_plan(plan: Plan) -> dict[str, Cost]:
    """Full LoRA at full resolution, and ``plan``."""
    family = family_of(plan.family)
    side = plan.s_max // plan.multiple
    return _against_full_lora(
        family,
        family.config(plan.model),
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
        name: key of `edge_dit.configs.CONFIGS`.
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
    head, tail, faults = choose_split(layers, skip_ratio, head_skip, tail_skip)
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
    return {
        "full LoRA": cost(family, config, range(layers), whole, text, rank, targets),
        "this plan": cost(family, config, trained, patch, text, rank, targets),
    }


def _measure(subgraph: TrainableSubgraph, batch: dict[str, Tensor]) -> tuple[int, int]:
    """(bytes kept for the backward pass, operations of both passes)."""
    not_activations = [*subgraph.parameters(), *subgraph.buffers(), *batch.values()]
    known = {_storage(tensor) for tensor in not_activations}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            kept[_storage(tensor)] = tensor
        return tensor

    counter = FlopCounterMode(display=False)
    with counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = subgraph(batch)
        loss.backward()
    return sum(t.untyped_storage().nbytes() for t in kept.values()), counter.get_total_flops()


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
