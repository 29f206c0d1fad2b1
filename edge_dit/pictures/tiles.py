"""Large pictures through an autoencoder in overlapping tiles, so that its memory is bounded.

Host and device cut and blend in the same way. A picture that is not larger than a tile goes through
whole, and nothing is blended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np

OVERLAP = 4
"""A tile shares one part in this many with its neighbour."""


def tiled(
    image: np.ndarray,
    run: Callable[[np.ndarray], Sequence[np.ndarray]],
    tile: int,
    step: int,
    scale: tuple[int, int],
) -> list[np.ndarray]:
    """What ``run`` makes of an image, tile by tile; where tiles overlap, their mean weighted by how
    far a place is from each tile's border.

    Args:
        image: [1, C, H, W].
        run: a tile [1, C, h, w] -> arrays [1, D, h u / d, w u / d].
        tile: longest side of a tile; a multiple of ``step``.
        step: tiles begin at multiples of it; both sides of the image are multiples too.
        scale: (u, d).

    Returns:
        Arrays [1, D, H u / d, W u / d], float32.
    """
    up, down = scale
    rows, columns = (_starts(size, tile, step) for size in image.shape[2:])
    if len(rows) == len(columns) == 1:
        return list(run(image))
    height, width = (min(size, tile) for size in image.shape[2:])
    weight = _ramp(height * up // down, rows)[:, None] * _ramp(width * up // down, columns)
    whole = tuple(size * up // down for size in image.shape[2:])
    sums: list[np.ndarray] = []
    weights = np.zeros(whole, np.float32)
    for top, left in product(rows, columns):
        made = run(np.ascontiguousarray(image[:, :, top : top + height, left : left + width]))
        place = tuple(
            slice(start * up // down, (start + size) * up // down)
            for start, size in ((top, height), (left, width))
        )
        sums = sums or [np.zeros((*part.shape[:2], *whole), np.float32) for part in made]
        for total, part in zip(sums, made, strict=True):
            total[:, :, *place] += part * weight
        weights[place] += weight
    return [total / weights for total in sums]


def _starts(size: int, tile: int, step: int) -> list[int]:
    """Where tiles begin along a side, as evenly as multiples of ``step`` allow."""
    if size <= tile:
        return [0]
    stride = max(step, (tile - tile // OVERLAP) // step * step)
    count = -(-(size - tile) // stride) + 1
    even = [round(number * (size - tile) / (count - 1) / step) * step for number in range(count)]
    return list(dict.fromkeys(even))


def _ramp(size: int, starts: Sequence[int]) -> np.ndarray:
    """Weights along a side of a tile, rising from its ends to a quarter of it."""
    if len(starts) == 1:
        return np.ones(size, np.float32)
    places = np.arange(size, dtype=np.float32) + np.float32(0.5)
    inwards = np.minimum(places, places[::-1])
    return np.minimum(inwards / np.float32(max(1, size // OVERLAP)), np.float32(1))
