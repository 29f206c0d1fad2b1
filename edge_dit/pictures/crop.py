"""Geometry of the timestep-aware dynamic patch (PAPER sec. 3.1, Eq. 1), in numpy.

`edge_dit.pictures.patch_sampler` is the same geometry as a torch module, the one that is exported.
"""

from __future__ import annotations

import numpy as np

from edge_dit.contract.bank import Crop


def crop_side(sigma: float, s_min: int, s_max: int, multiple: int) -> int:
    """Side in pixels of the crop at noise level ``sigma``: Eq. 1 of the paper,

        s(sigma) = s_min + sigma (s_max - s_min),

    rounded (half to even) to a multiple of ``multiple``, the VAE's downsampling factor. Computed in
    float32, as the exported graphs do.
    """
    side = np.float32(s_min) + np.float32(sigma) * np.float32(s_max - s_min)
    return int(np.round(side / np.float32(multiple))) * multiple


def crop_at(
    sigma: float, u: float, v: float, height: int, width: int, s_min: int, s_max: int, multiple: int
) -> Crop:
    """The crop of a draw.

    Args:
        sigma: noise level in [0, 1].
        u: horizontal position in [0, 1]; 0 is the leftmost crop, 1 the rightmost.
        v: vertical position in [0, 1]; 0 is the topmost crop, 1 the lowest.
        height: image height in pixels, at least s_max.
        width: image width in pixels, at least s_max.
        s_min: smallest side in pixels, also the side of the patch.
        s_max: largest side in pixels.
        multiple: the VAE's downsampling factor in pixels.
    """
    side = crop_side(sigma, s_min, s_max, multiple)

    def start(position: float, size: int) -> int:
        free = size - side
        return min(int(np.floor(np.float32(position) * np.float32(free + 1))), free)

    return Crop(start(v, height), start(u, width), side)
