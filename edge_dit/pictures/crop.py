"""The crop of the timestep-aware dynamic patch (docs/method.md, Eq. 1), in numpy.

`edge_dit.models.patch_sampler` computes the same crop in torch, and is what is exported.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_dit.contract.bank import Crop


@dataclass(frozen=True)
class CropRule:
    """Size and place of a crop at a noise level.

    Attributes:
        s_min: smallest crop side in pixels; every crop is resized to a patch of this side.
        s_max: largest crop side, in pixels.
        multiple: crop sides are multiples of this many pixels: the autoencoder's downsampling
            factor times the transformer's patch size.
    """

    s_min: int
    s_max: int
    multiple: int

    def side(self, sigma: float) -> int:
        """Side in pixels of the crop at noise level ``sigma`` in [0, 1], by Eq. 1 of the paper:

            s(sigma) = s_min + sigma (s_max - s_min)

        It is rounded to ``multiple`` (half to even) and computed in float32, as the exported graphs
        do.
        """
        side = np.float32(self.s_min) + np.float32(sigma) * np.float32(self.s_max - self.s_min)
        return int(np.round(side / np.float32(self.multiple))) * self.multiple

    def crop(self, sigma: float, u: float, v: float, height: int, width: int) -> Crop:
        """The crop of a draw, in pixels.

        Args:
            sigma: noise level in [0, 1].
            u: horizontal position in [0, 1]; 0 is the leftmost crop, 1 the rightmost.
            v: vertical position in [0, 1]; 0 is the topmost crop, 1 the lowest.
            height, width: of the image in pixels, at least s_max.
        """
        side = self.side(sigma)

        def start(position: float, size: int) -> int:
            free = size - side
            return min(int(np.floor(np.float32(position) * np.float32(free + 1))), free)

        return Crop(start(v, height), start(u, width), side)
