"""loss.png: each step's loss, its running mean, and the mean by noise level."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_dit.errors import is_installed
from edge_dit.store.files import write_atomic

BINS = 8
"""Number of equal parts of (0, 1] in which losses are averaged."""


def plot_losses(path: Path, sigmas: Sequence[float], losses: Sequence[float]) -> None:
    """Draw the losses of a run; does nothing where matplotlib is not installed.

    Args:
        path: the picture.
        sigmas: noise level of each step's draw, in (0, 1].
        losses: of each step; nan where it was skipped.
    """
    steps = np.flatnonzero(np.isfinite(losses))
    if not len(steps) or not is_installed("matplotlib"):
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    loss, sigma = np.asarray(losses)[steps], np.asarray(sigmas)[steps]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    window = max(1, len(loss) // 20)
    mean = np.convolve(loss, np.ones(window) / window, mode="valid")
    left.plot(steps, loss, ".", markersize=2, alpha=0.3, color="tab:blue")
    left.plot(steps[window - 1 :], mean, color="tab:blue", label=f"mean of {window} steps")
    left.set(xlabel="step", ylabel="flow-matching loss", title="Loss", yscale="log")
    left.legend()
    half = len(loss) // 2
    for part, label in ((slice(0, half), "first half"), (slice(half, None), "second half")):
        right.plot(*_by_level(sigma[part], loss[part]), "o-", label=label)
    right.set(xlabel="sigma", ylabel="mean loss", title="Loss by noise level")
    right.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())


def _by_level(sigma: np.ndarray, loss: np.ndarray) -> tuple[list[float], list[float]]:
    """Middles of the bins that hold a step, and the mean loss in each."""
    edges = np.linspace(0, 1, BINS + 1)
    which = np.clip(np.digitize(sigma, edges) - 1, 0, BINS - 1)
    filled = [b for b in range(BINS) if (which == b).any()]
    middles = [(edges[b] + edges[b + 1]) / 2 for b in filled]
    return middles, [float(loss[which == b].mean()) for b in filled]
