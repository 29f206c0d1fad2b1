"""Frozen matrices in four bits, and adapters that start as what rounding to four bits loses.

A matrix W [out, in] is held as Q, as `edge_dit.models.quantize.to_int4` has it. An adapter of rank
r may start as L R, so that training begins close to W = Q + L R. Two ways to part W:

    srr     arXiv 2602.02001: the leading k directions of W S are kept out of rounding, the other
            r - k are those of what rounding the rest lost. S has the sizes of the inputs on its
            diagonal. The paper estimates k; here each even k is tried, for matrices are small.
    odlri   arXiv 2506.02077: W's columns of the largest inputs, as far as rank r goes, are kept out
            of the first rounding; then L R and Q take turns to approximate what the other leaves.

What is shipped is the adapter minus its start: L R stands for rounding errors, which the
full-precision model does not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from side_by_side import ManyLora
from torch import Tensor, nn

from edge_dit.contract.targets import INT4
from edge_dit.models.quantize import kind_in_block, rounded

TURNS = 4
"""Of L R and Q, in odlri."""
OUTLIERS = 0.1
"""Share of the inputs that odlri calls large."""


class Parts(NamedTuple):
    """W = rounded + left right, nearly: [out, in], [out, r], [r, in]."""

    rounded: Tensor
    left: Tensor
    right: Tensor


def in_four_bits(weight: Tensor) -> Tensor:
    """A matrix [out, in] after it was stored in four bits and read back."""
    return rounded(weight, kind_in_block(weight.shape, INT4))


def leading(matrix: Tensor, sizes: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [out, rank] and [rank, in] that are nearest to a matrix [out, in], where the error of
    a column counts by the size of its input, [in].
    """
    u, s, v = torch.linalg.svd(matrix * sizes, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank] / sizes


def srr(weight: Tensor, sizes: Tensor, rank: int) -> Parts:
    """Structured residual reconstruction, with the k whose error is least."""
    found: list[tuple[float, Parts]] = []
    for kept in range(0, rank + 1, 2):
        left, right = leading(weight, sizes, kept)
        low = in_four_bits(weight - left @ right)
        more, other = leading(weight - left @ right - low, sizes, rank - kept)
        parts = Parts(low, torch.cat([left, more], 1), torch.cat([right, other], 0))
        found.append((error(weight, sizes, parts), parts))
    return min(found, key=lambda pair: pair[0])[1]


def odlri(weight: Tensor, sizes: Tensor, rank: int) -> Parts:
    """Outlier-driven start, then turns of rounding and approximation."""
    large = torch.zeros_like(sizes)
    large[sizes.topk(max(1, round(OUTLIERS * len(sizes)))).indices] = 1
    left, right = leading(weight * large, sizes, rank)
    for _ in range(TURNS):
        low = in_four_bits(weight - left @ right)
        left, right = leading(weight - low, sizes, rank)
    return Parts(low, left, right)


def error(weight: Tensor, sizes: Tensor, parts: Parts) -> float:
    """Squared error of the parts, each column counted by the size of its input."""
    off = weight - parts.rounded - parts.left @ parts.right
    return float((off * sizes).square().sum())


STARTS = {"srr": srr, "odlri": odlri}


@contextmanager
def measuring(layers: Sequence[ManyLora]) -> Iterator[list[Tensor]]:
    """Root mean square of each input channel of layers, [in] each, in the end."""
    sums: list[Tensor] = [torch.zeros(()) for _ in layers]
    sizes: list[Tensor] = []

    def add(number: int, x: Tensor) -> None:
        rows = x.movedim(1, -1) if x.dim() == 4 else x
        sums[number] = sums[number] + rows.detach().flatten(0, -2).square().mean(0)

    hooks = [
        layer.register_forward_pre_hook(lambda _m, inputs, number=number: add(number, inputs[0]))
        for number, layer in enumerate(layers)
    ]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()
    sizes += [total.sqrt().clamp(min=1e-6) for total in sums]


@torch.no_grad()
def begin_in_four_bits(
    layers: Sequence[ManyLora], frozen: Sequence[nn.Module], sizes: Sequence[Tensor], how: str
) -> list[Tensor]:
    """Round frozen matrices in place, and let adapters start as what that loses; their weights as
    they were, for `end_in_four_bits`.

    Args:
        layers: with adapters.
        frozen: all linear layers and 1x1 convolutions, those within ``layers`` too.
        sizes: of ``layers``' inputs, from `measuring`.
        how: one of `STARTS`; any other start leaves adapters as they are.
    """
    before = [module.weight.clone() for module in frozen]
    for module in frozen:
        module.weight.copy_(in_four_bits(module.weight.flatten(1)).reshape(module.weight.shape))
    if how in STARTS:
        wide = {id(module): weight for module, weight in zip(frozen, before, strict=True)}
        for layer, size in zip(layers, sizes, strict=True):
            weight = wide[id(layer.base)]
            parts = STARTS[how](weight.flatten(1), size, layer.a.shape[1])
            layer.base.weight.copy_(parts.rounded.reshape(weight.shape))
            layer.a.copy_(parts.right.expand_as(layer.a))
            layer.b.copy_((parts.left / layer.scale).expand_as(layer.b))
            layer.begun = layer.a.detach().clone(), layer.b.detach().clone()
    return before


@torch.no_grad()
def end_in_four_bits(
    layers: Sequence[ManyLora], frozen: Sequence[nn.Module], before: Sequence[Tensor]
) -> None:
    """Put the full-precision weights back, and take their start out of adapters."""
    for module, weight in zip(frozen, before, strict=True):
        module.weight.copy_(weight)
    for layer in layers:
        layer.without_start = layer.begun is not None
