"""The sizes of a plan, which host and device read alike."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from edge_dit.pictures.crop import CropRule
from edge_dit.pictures.window import WindowRule

Side = Annotated[int, Field(ge=1, lt=2**31)]


class PatchSizes(BaseModel):
    """What patches are.

    Attributes:
        s_min: side of a patch and smallest crop side, pixels.
        s_max: largest crop side, and shorter side of every image, pixels.
        multiple: pixels per side of a token: the autoencoder's downsampling factor times the
            transformer's patch size.
        window: whether patches are windows of the states of whole pictures, not crops of pictures.
    """

    s_min: Side
    s_max: Side
    multiple: Side
    window: bool = False

    @property
    def passing(self) -> int:
        """Side in pixels of what passes the frozen blocks when a bank is made."""
        return self.s_max if self.window else self.s_min

    @property
    def passing_grid(self) -> tuple[int, int]:
        """Its token rows and columns."""
        side = self.passing // self.multiple
        return side, side

    @property
    def passing_factor(self) -> int:
        """How many times the bytes of a stored draw a draw has that passes the frozen blocks."""
        return -(-(self.passing**2) // self.s_min**2)

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns of a patch."""
        side = self.s_min // self.multiple
        return side, side

    @property
    def crop_rule(self) -> CropRule:
        """Size and place of the crops that pass the frozen blocks."""
        return CropRule(self.passing, self.s_max, self.multiple)

    @property
    def window_rule(self) -> WindowRule | None:
        """Size and place of windows, if patches are windows."""
        return WindowRule(self.grid[0], self.s_max // self.multiple) if self.window else None
