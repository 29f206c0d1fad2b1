"""Nudge LoRA weights until no value before a ReLU is within rounding of zero.

SANA's linear attention takes a ReLU of its queries and keys. A step of a model of real size has
millions of them, and some always lie so close to zero that rounding decides their side. PyTorch's
own gradients in float32 and in float64 then differ by a hundredth of their largest value, so such a
step cannot tell a right export from a wrong one (nor, at that size, can one whose gradient goes
through a tail: its blocks have no LoRA). But a query is W x + B A x, and a small change of
one row of B moves one of its channels. Rows of B are changed until every value is clear of zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from edge_dit.contract.adapter import Rows
from edge_dit.models.subgraph import TrainableSubgraph

MARGIN = 2e-5
"""Least distance from zero, relative to the root mean square of the module's output. Rounding
reaches 4e-6 in 14 blocks of SANA-0.6B, 5e-7 on average.
"""
MOVE = 1e-3
"""Standard deviation of what is added to a row of B."""
TRIES = 30
"""Nudges of a module's rows before it is given up."""


@torch.no_grad()
def nudge_from_kinks(subgraph: TrainableSubgraph, draw: Mapping[str, np.ndarray]) -> Rows | None:
    """Nudge LoRA B, in place, until the gradients of ``draw`` do not depend on rounding.

    Args:
        subgraph: with LoRA in place.
        draw: batch tensors by name.

    Returns:
        The changed rows of LoRA B with their new values; empty in families without a ReLU. None if
        values stay too close to zero, as in modules without LoRA; the adapter is then unchanged.
    """
    parameters = subgraph.lora_parameters()
    names = {id(parameter): name for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    before: dict[str, torch.Tensor] = {}
    given_up = []

    def clear_of_zero(
        module: Any, arguments: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor:
        for _ in range(TRIES):
            near = _channels_near_zero(output)
            if not near.any():
                return output
            if not hasattr(module, "lora_B"):
                break
            b = module.lora_B["default"].weight
            before.setdefault(names[id(b)], b.clone())
            b[near] += MOVE * torch.randn(b[near].shape, generator=generator)
            output = module.forward(*arguments)
        given_up.append(module)
        return output

    ends = tuple(f".{name}" for name in subgraph.family.before_relu)
    graded = tuple(f"{name}." for name in subgraph.differentiated())
    modules = [
        module
        for name, module in subgraph.named_modules()
        if name.endswith(ends) and name.startswith(graded)
    ]
    handles = [module.register_forward_hook(clear_of_zero) for module in modules]
    try:
        subgraph.predict({name: torch.from_numpy(value) for name, value in draw.items()})
    finally:
        for handle in handles:
            handle.remove()
    if given_up:
        for name, value in before.items():
            parameters[name].copy_(value)
        return None
    rows: Rows = {}
    for name, value in before.items():
        numbers = (parameters[name] != value).any(dim=1).nonzero().flatten()
        rows[name] = numbers.numpy(), parameters[name][numbers].numpy()
    return rows


def _channels_near_zero(output: torch.Tensor) -> torch.Tensor:
    """Which channels of ``output`` [1, N, channels] have a value within `MARGIN` of zero, bool."""
    limit = MARGIN * output.square().mean().sqrt()
    return (output.abs() < limit).flatten(0, -2).any(dim=0)
