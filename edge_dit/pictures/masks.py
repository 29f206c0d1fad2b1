"""Loss masks: which parts of a picture a draw learns.

``x.mask.png`` beside ``x.jpg``: what is white counts, what is black does not, gray in part. Or the
alpha channel of the picture itself. A mask is cropped and resized as its picture, and averaged to
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ENDING = ".mask.png"
"""How the name of a mask ends; before it stands the stem of its picture."""
ALPHA = "alpha"
"""Stands in a bank's index for the digest of a mask that is the picture's alpha channel."""


def of_tokens(patch: np.ndarray, grid: tuple[int, int], target: Sequence[int]) -> np.ndarray:
    """The mask of a draw as its loss takes it: one value a token, spread over what the token
    predicts.

    Args:
        patch: the patch's mask, [s_min, s_min] float32 in [0, 1].
        grid: token rows and columns of the patch.
        target: shape of the draw's target: [1, N, C], or latents [1, C, h, w].

    Returns:
        [1, N, 1] or [1, 1, h, w], float32.

    Example:
        >>> half = np.repeat([[0.0], [1.0]], 2, 0) * np.ones((4, 4), np.float32)
        >>> of_tokens(half, (2, 2), (1, 4, 8)).ravel().tolist()
        [0.0, 0.0, 1.0, 1.0]
    """
    rows, columns = grid
    means = patch.reshape(rows, -1, columns, patch.shape[1] // columns).mean((1, 3))
    if len(target) == 3:
        return means.reshape(1, rows * columns, 1)
    large = np.repeat(np.repeat(means, target[2] // rows, 0), target[3] // columns, 1)
    # Not [None, None], whose strides of 0 ExecuTorch 1.5 refuses.
    return large.reshape(1, 1, *large.shape)
