"""Windows: patches that are cut out of the states of whole pictures, at their own scale and place.

The crops of the paper's Eq. 1 are resized, so the model sees the subject at another scale than in
the pictures it draws. Windows are not: the frozen blocks see the whole picture, and of each of its
states the trained blocks see a square. They cost a training step what a crop's patch costs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_dit.contract.bank import Crop, Draw
from edge_dit.contract.names import (
    COND,
    ENTRY,
    RESIDUAL,
    TAIL_RESIDUAL,
    TARGET,
    WEIGHT_MASK,
)
from edge_dit.pictures.crop import CropRule


@dataclass(frozen=True)
class Window:
    """A square of a picture's tokens.

    Attributes:
        place: of the square, in tokens.
        side: token rows, and columns, of the picture.
    """

    place: Crop
    side: int

    def tokens(self, value: Any, axis: int = 1) -> Any:
        """Those of the square.

        Args:
            value: of all the picture's tokens along ``axis``, row by row; those of text, which are
                kept, may be before them.
            axis: of the tokens.
        """
        rows, columns = (
            np.arange(start, start + self.place.side) for start in (self.place.top, self.place.left)
        )
        inside = (rows[:, None] * self.side + columns).ravel()
        return with_text(value, inside, self.side**2, axis)

    @property
    def outside(self) -> np.ndarray:
        """Whether each token of the picture is around the square, [side, side] bool."""
        outside = np.ones((self.side, self.side), bool)
        top, left, side = self.place.top, self.place.left, self.place.side
        outside[top : top + side, left : left + side] = False
        return outside

    def latents(self, value: Any) -> Any:
        """Those of the square, of latents [1, C, h, w]."""
        each = value.shape[2] // self.side
        rows, columns = (
            slice(start * each, (start + self.place.side) * each)
            for start in (self.place.top, self.place.left)
        )
        return value[:, :, rows, columns]

    def cut(self, batch: Mapping[str, np.ndarray], placed: Collection[str]) -> dict[str, Any]:
        """A draw's tensors as a bank stores them, of those of the whole picture.

        Args:
            batch: by the names of banks and exported graphs.
            placed: conditioning with a row for each token.
        """

        def of(name: str, value: np.ndarray) -> np.ndarray:
            if name in (TARGET, WEIGHT_MASK):
                return self.latents(value) if value.ndim == 4 else self.tokens(value)
            if name in (ENTRY, TAIL_RESIDUAL) or name.startswith(f"{RESIDUAL}."):
                return self.tokens(value)
            if name.startswith(COND) and name.removeprefix(COND) in placed:
                return self.tokens(value, 0)
            return value

        # ExecuTorch refuses other strides than those that it traced.
        return {name: np.ascontiguousarray(of(name, value)) for name, value in batch.items()}


def with_text(value: Any, numbers: np.ndarray, tokens: int, axis: int = 1) -> Any:
    """Some of a picture's tokens, and all of the text before them.

    Args:
        value: of text, if there is any, and all tokens of a picture along ``axis``.
        numbers: of the picture's tokens that are kept, int.
        tokens: that the picture has.
        axis: of the tokens.
    """
    text = value.shape[axis] - tokens
    kept = np.concatenate([np.arange(text), text + numbers])
    return value[(slice(None),) * axis + (kept,)]


@dataclass(frozen=True)
class WindowRule:
    """Size and place of windows.

    Attributes:
        patch: tokens of a window's side.
        side: tokens of the picture's side.

    Example:
        >>> WindowRule(2, 4).window(Draw(0, 0, 0, 0.5, 1.0, 0.0, Crop(0, 0, 32))).place
        Crop(top=0, left=2, side=2)
    """

    patch: int
    side: int

    def window(self, draw: Draw) -> Window:
        """The window of a draw, at its u and v."""
        rule = CropRule(self.patch, self.side, 1)
        return Window(rule.crop(0.0, draw.u, draw.v, self.side, self.side), self.side)
