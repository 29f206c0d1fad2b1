"""Away from the places where a gradient jumps, so that two implementations can be compared.

SANA's linear attention takes a ReLU of its queries and keys. A model of its real size has millions
of them in a step, and some always lie so close to zero that rounding decides which side they are
on: PyTorch's own gradients in float32 and float64 then differ by a hundredth of their largest
value. Such a step says nothing about an export. But a query is W x + B A x, and a few numbers in
one row of B move one channel of it: rows are moved until every value is clear of zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from edge_dit.contract.adapter import Rows
from edge_dit.models.subgraph import TrainableSubgraph

MARGIN = 2e-5
"""Least distance from zero, over the root mean square of the module's output. Rounding reaches
4e-6 in 14 blocks of SANA-0.6B, 5e-7 on average."""
MOVE = 1e-3
"""Spread of what is added to a row of B."""
TRIES = 30
"""Moves of a module's rows after which it is given up."""


@torch.no_grad()
def step_aside(subgraph: TrainableSubgraph, draw: Mapping[str, np.ndarray]) -> Rows | None:
    """Move the adapter, in place, to where the draw's gradients do not jump.

    Args:
        subgraph: with LoRA in place.
        draw: batch tensors by name.

    Returns:
        The rows of LoRA B that were moved, with their new values: empty in families without a ReLU.
        None, and the adapter as it was, where values lie too close to zero in modules without LoRA.
    """
    parameters = subgraph.lora_parameters()
    names = {id(parameter): name for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    before: dict[str, torch.Tensor] = {}
    stuck = []

    def look(module: Any, arguments: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        for _ in range(TRIES):
            close = _close(output)
            if not close.any():
                return output
            if not hasattr(module, "lora_B"):
                break
            b = module.lora_B["default"].weight
            before.setdefault(names[id(b)], b.clone())
            b[close] += MOVE * torch.randn(b[close].shape, generator=generator)
            output = module.forward(*arguments)
        stuck.append(module)
        return output

    ends = tuple(f".{name}" for name in subgraph.family.before_relu)
    modules = [module for name, module in subgraph.named_modules() if name.endswith(ends)]
    handles = [module.register_forward_hook(look) for module in modules]
    try:
        subgraph.predict({name: torch.from_numpy(value) for name, value in draw.items()})
    finally:
        for handle in handles:
            handle.remove()
    if stuck:
        for name, value in before.items():
            parameters[name].copy_(value)
        return None
    rows: Rows = {}
    for name, value in before.items():
        numbers = (parameters[name] != value).any(dim=1).nonzero().flatten()
        rows[name] = numbers.numpy(), parameters[name][numbers].numpy()
    return rows


def _close(output: torch.Tensor) -> torch.Tensor:
    """Channels with a value too close to zero; output [1, N, channels]."""
    limit = MARGIN * output.square().mean().sqrt()
    return (output.abs() < limit).flatten(0, -2).any(dim=0)
