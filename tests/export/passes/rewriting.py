"""What the tests of the rewrites share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import tiny
from edge_dit_export.passes import Pass, apply, copy_of


def train_step() -> tuple[fx.GraphModule, list[Tensor]]:
    """A copy of the tiny train step's graph, and its example inputs."""
    _, _, step = tiny.traced()
    return copy_of(step.module), list(step.inputs.values())


def trace(function: Callable[..., object], *inputs: Tensor) -> tuple[fx.GraphModule, list[Tensor]]:
    """The ATen graph of a function of tensors."""
    return copy_of(make_fx(lambda *args: (function(*args),))(*inputs)), list(inputs)


def ops(module: fx.GraphModule) -> Counter[str]:
    """How often each ATen operation occurs, by its short name ("mm", "add")."""
    return Counter(
        n.target.__name__.split(".")[0] for n in module.graph.nodes if n.op == "call_function"
    )


def rewrite(
    graph: tuple[fx.GraphModule, list[Tensor]], *passes: Pass, tolerance: float = 0.0
) -> tuple[Counter[str], Counter[str], int]:
    """Run passes in place; operations before and after, and the number of rewrites.

    Fails unless every output is the same to ``tolerance`` of its largest value.
    """
    module, inputs = graph
    before = ops(module)
    with torch.no_grad():
        expected = module(*inputs)
        counts = apply(module, passes)
        found = module(*inputs)
    names = [str(i) for i in range(len(expected))]
    tiny.assert_close(
        dict(zip(names, expected, strict=True)), dict(zip(names, found, strict=True)), tolerance
    )
    return before, ops(module), sum(counts.values())
