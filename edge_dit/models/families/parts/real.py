"""Rotation of pairs of numbers, which diffusers writes with complex numbers, in real ones.

No target has complex numbers. diffusers turns a query or key x [..., d] by frequencies f
[..., d / 2] with ``view_as_real(view_as_complex(x as pairs) * f)``, in functions of several names
and, in Z-Image, within an attention processor. So not these functions are replaced, but the two
views: within `RealRotations` f is real, [..., d], real and imaginary parts in turn, and the product
is (a + b i) (c + d i) = (a c - b d) + (a d + b c) i, written out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class _Pairs:
    """What stands for a complex tensor, in real numbers: real and imaginary parts [..., 2]."""

    parts: Tensor

    def __mul__(self, other: Tensor) -> Tensor:
        """The product, as such parts, with ``other`` [..., d], such parts in turn."""
        real, imaginary = self.parts.unbind(-1)
        cos, sin = other.unflatten(-1, (-1, 2)).unbind(-1)
        turned = real * cos - imaginary * sin, real * sin + imaginary * cos
        return torch.stack(turned, dim=-1)


def interleaved(rotations: Tensor) -> Tensor:
    """Complex rotations [..., d / 2] as real numbers [..., d], real and imaginary parts in turn."""
    return torch.view_as_real(rotations).flatten(-2)


class RealRotations(TorchFunctionMode):
    """A context in which diffusers' complex rotations compute in real numbers. Frequencies must
    then be real.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.view_as_complex:
            return _Pairs(*args)
        if func is torch.view_as_real and not args[0].is_complex():
            return args[0]
        return func(*args, **(kwargs or {}))
