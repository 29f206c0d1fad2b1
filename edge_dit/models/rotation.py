"""Rotated products: a frozen matrix is stored as W H, and its input is multiplied by H first.

H is a block Hadamard matrix, orthonormal and its own inverse, so x W^T = (x H) (W H)^T. What stands
out in one channel of x, or in one column of W, is spread over a block of channels before it is
rounded to int8 (ConvRot, arXiv 2512.03673). LoRA sits beside the product and sees x as it is.

A module that computes so has another class while its name and its weight's name stay; so exports
are traced from it as from any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_dit.models.subgraph import frozen_layers

LARGEST_BLOCK = 128
"""Most channels that are mixed."""


def block_of(channels: int) -> int:
    """Channels that are mixed where there are so many: the largest power of two that divides them,
    up to `LARGEST_BLOCK`.
    """
    return math.gcd(channels, LARGEST_BLOCK)


@cache
def hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix over sqrt(size): float32 [size, size], symmetric, orthonormal.

    Args:
        size: a power of two.
    """
    index = torch.arange(size)
    ones = index[:, None] & index
    signs = torch.ones(size, size)
    for bit in range(size.bit_length() - 1):
        signs = torch.where((ones >> bit) & 1 == 1, -signs, signs)
    return signs / math.sqrt(size)


@torch.library.custom_op("edge_dit::rotate", mutates_args=())
def rotate(x: Tensor) -> Tensor:
    """X H, shaped like ``x``.

    Args:
        x: float32 [..., K]; neighbours among the K channels are mixed, `block_of` K at a time.
    """
    block = block_of(x.shape[-1])
    mixed = x.reshape(-1, block) @ hadamard(block).to(x.dtype)
    return mixed.reshape(x.shape)


@rotate.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


rotate.register_autograd(lambda _ctx, dy: rotate(dy))  # H is its own transpose


def rotated_matrix(weight: Tensor) -> Tensor:
    """W H of a weight [out, in] or [out, in, 1, 1]."""
    return rotate(weight.flatten(1)).reshape(weight.shape)


class RotatedLinear(nn.Linear):
    """A linear layer whose weight is W H."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return functional.linear(rotate(input), self.weight, self.bias)


class RotatedConv1x1(nn.Conv2d):
    """The same of a 1x1 convolution."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, O, H, W]."""
        return super().forward(rotate(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def is_rotated(module: nn.Module) -> bool:
    """Whether a module takes its weight for W H."""
    return isinstance(module, (RotatedLinear, RotatedConv1x1))


def take_for_rotated(module: nn.Module) -> None:
    """Let a linear layer or 1x1 convolution take its weight for W H, whatever it is; in place."""
    linear = isinstance(module, nn.Linear)
    module.__class__ = RotatedLinear if linear else RotatedConv1x1


@contextmanager
def taken_for_rotated(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Take every frozen matrix of blocks for W H while this lasts, whatever it is: to trace them.

    Args:
        blocks: LoRA in place, if they carry any; on any device.
    """
    modules: list[Any] = [*frozen_layers(blocks)]
    before = [module.__class__ for module in modules]
    try:
        for module in modules:
            take_for_rotated(module)
        yield
    finally:
        for module, kind in zip(modules, before, strict=True):
            module.__class__ = kind
