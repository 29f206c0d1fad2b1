"""loss.png: each step's loss, its running mean, and the mean by noise level."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from edge_dit.errors import is_installed
from edge_dit.store.files import write_atomic
from edge_dit_runtime.step_log import StepLog, smoothed


def plot_losses(path: Path, log: StepLog) -> None:
    """Draw the losses of a run; does nothing where matplotlib is not installed.

    Args:
        path: the picture.
        log: its steps.
    """
    steps = np.flatnonzero(np.isfinite(log.losses))
    if not len(steps) or not is_installed("matplotlib"):
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    ends, means, window = smoothed(log.losses)
    losses = np.asarray(log.losses)[steps]
    left.plot(steps, losses, ".", markersize=2, alpha=0.3, color="tab:blue")
    left.plot(ends, means, color="tab:blue", label=f"mean of {window} steps")
    left.set(xlabel="step", ylabel="flow-matching loss", title="Loss", yscale="log")
    left.legend()
    for levels, label in zip(log.by_level(), ("first", "last"), strict=True):
        middles, mean = [level.middle for level in levels], [level.loss for level in levels]
        count = sum(level.steps for level in levels)
        right.plot(middles, mean, "o-", label=f"{label} {count} steps")
    right.set(xlabel="sigma", ylabel="mean loss", title="Loss by noise level")
    right.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())
