"""Products with frozen matrices in int8, both ways: what a bundle with ``compute = "int8"`` does.

A weight W [N, K] is stored once, as int8 values V with a scale s of each output channel: W = s V.
Activations are quantised where they are used, to 256 levels, with one scale and zero point per
tensor, as ONNX's DynamicQuantizeLinear does, or per row (token), as XNNPACK's dynamically quantised
layers do. With q(x) = (x^ - z) s_x, x^ and z integers:

    forward     y  = x W^T        ~ s_x s_n  (x^ - z) V^T
    backward    dx = dy W         ~ s_g      (g^ - z) V           g = dy s

So the one V serves both directions. Sums are of integers and exact. LoRA, attention, norms, softmax
and loss stay in float32.

Here the same is done in PyTorch, slowly: exports are traced from it and compared with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edge_dit.models.quantize import to_int8
from edge_dit.models.rotation import is_rotated, rotate
from edge_dit.models.subgraph import frozen_layers

LEVELS = 255
"""Steps of an activation's range."""
LOWEST, HIGHEST = -128.0, 127.0
"""Levels where each row has its own scale."""


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """The values that integer products see, (x^ - z) with its scale s_x: DynamicQuantizeLinear.

    The range always holds 0, and the zero point is rounded to a level, so that 0 stays exact.

    Args:
        x: float32 [M, K]; or [B, M, K], where every picture of the batch has a range of its own, as
            on a device, where it comes alone.

    Returns:
        integers in float32, shaped like ``x``, and the scale, [1, 1] or [B, 1, 1]; ``x`` is about
        their product.
    """
    axes = (-2, -1)
    low, high = x.amin(axes, True).clamp(max=0.0), x.amax(axes, True).clamp(min=0.0)
    scale = (high - low) / LEVELS
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.round((-low / scale).clamp(0, LEVELS))
    levels = (torch.round(x / scale) + zero).clamp(0, LEVELS)
    return levels - zero, scale


def quantized_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same with a scale and zero point for each row: XNNPACK's f32 -> qd8 (executorch 1.5.1).

    It multiplies by the reciprocal of the scale, and rounds the zero point from that end of the
    range whose own rounding error is smaller.

    Args:
        x: float32 [..., K].

    Returns:
        integers in float32, shaped like ``x``, and scales [..., 1]; ``x`` is about their product.
    """
    low = x.amin(-1, keepdim=True).clamp(max=0.0)
    high = x.amax(-1, keepdim=True).clamp(min=0.0)
    span = high - low
    inverse = torch.where(span > 0, LEVELS / span, torch.ones_like(span))
    lowest, highest = low * inverse, high * inverse
    from_lowest = (LOWEST + lowest) + (HIGHEST + highest) > 0
    zero = torch.where(from_lowest, LOWEST - lowest, HIGHEST - highest)
    zero = torch.round(zero.clamp(LOWEST, HIGHEST))
    levels = torch.round((x * inverse).clamp(LOWEST - zero, HIGHEST - zero))
    return levels, 1 / inverse


@torch.library.custom_op("edge_dit::frozen_product", mutates_args=())
def frozen_product(x: Tensor, weight: Tensor, back: bool, rows: bool = False) -> Tensor:
    """A product with a frozen matrix in int8: x W^T, or x W.

    Args:
        x: float32 [M, K] or [B, M, K], with N for K where it goes ``back``.
        weight: float32 [N, K]; it is rounded to int8 here, and a weight that was rounded before
            stays what it is.
        back: whether this is the product of the backward pass.
        rows: whether each row of ``x`` has its own scale.

    Returns:
        float32 [M, N] or [B, M, N], or K for N.
    """
    values, scale = to_int8(weight)
    levels, own = (quantized_rows if rows else quantized)(x * scale if back else x)
    # Exact, whatever the order: no partial sum reaches the first integer that would be rounded.
    exact = LEVELS * 127 * levels.shape[-1] < 2**24
    kind = torch.float32 if exact else torch.float64
    matrix = values.to(kind) if back else values.to(kind).T
    sums = (levels.to(kind) @ matrix).float()
    if rows:
        return sums * own if back else sums * own * scale
    return sums * own if back else sums * (own * scale)


@frozen_product.register_fake
def _(x: Tensor, weight: Tensor, back: bool, rows: bool = False) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1] if back else weight.shape[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.weight, ctx.back, ctx.rows = inputs


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    return frozen_product(dy, ctx.weight, not ctx.back, ctx.rows), None, None, None


frozen_product.register_autograd(_gradient, setup_context=_keep)


class Int8Linear(nn.Linear):
    """A linear layer whose frozen weight is multiplied in int8.

    Attributes:
        rows: as `frozen_product` takes it.
        rotated: whether the weight is one of `edge_dit.models.rotation`.
    """

    rows: bool
    rotated: bool

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N]; the bias is added in float32."""
        x = rotate(input) if self.rotated else input
        return _biased(x, self.weight, self.bias, self.rows)


class Int8Conv1x1(nn.Conv2d):
    """The same of a 1x1 convolution."""

    rows: bool
    rotated: bool

    def forward(self, input: Tensor) -> Tensor:
        """[1, C, H, W] -> [1, O, H, W]."""
        x = input.permute(0, 2, 3, 1)
        x = rotate(x) if self.rotated else x
        y = _biased(x, self.weight.flatten(1), self.bias, self.rows)
        return y.permute(0, 3, 1, 2)


def _biased(x: Tensor, matrix: Tensor, bias: Tensor | None, rows: bool) -> Tensor:
    pictures = x.shape[:1] if x.shape[0] > 1 else ()
    y = frozen_product(x.reshape(*pictures, -1, x.shape[-1]), matrix, False, rows)
    y = y if bias is None else y + bias
    return y.view(*x.shape[:-1], -1)


@contextmanager
def computing_in_int8(blocks: Iterable[nn.Module], rows: bool = False) -> Iterator[None]:
    """Multiply with the frozen matrices of blocks in int8 while this lasts; weights and names stay.

    Args:
        blocks: LoRA in place, if they carry any.
        rows: whether each row of an activation has its own scale, as with ExecuTorch, or each
            tensor, as with ONNX.
    """
    modules: list[Any] = [*frozen_layers(blocks)]
    before: list[Any] = [module.__class__ for module in modules]
    try:
        for module in modules:
            # The module itself changes its class, so that what wraps it need not know.
            linear = isinstance(module, nn.Linear)
            module.rotated, module.rows = is_rotated(module), rows
            module.__class__ = Int8Linear if linear else Int8Conv1x1  # type: ignore[assignment]
        yield
    finally:
        for module, kind in zip(modules, before, strict=True):
            module.__class__ = kind
            del module.rows, module.rotated
