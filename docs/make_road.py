"""Draw docs/road.png: the road from a job on the host to an adapter made on the device.

python docs/make_road.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, HOST, DEVICE, STAGE = "#22313f", "#eaf1f8", "#eaf6ec", "#ffffff"
FILES = {
    "job.toml\npictures\nmodel": (0.9, 2.5),
    "plan.json": (3.4, 2.5),
    "bank/": (6.4, 3.6),
    "bundle/": (6.4, 1.4),
    "run/": (9.6, 2.5),
    "lora/": (12.0, 2.5),
}
STAGES = {
    "plan": ("job.toml\npictures\nmodel", "plan.json", "which blocks,\nwhich sizes", (2.15, 2.5)),
    "precompute": ("plan.json", "bank/", "what frozen blocks add", (4.35, 3.6)),
    "export": ("plan.json", "bundle/", "trained blocks,\nloss, optimizer", (4.2, 1.35)),
    "train": ("bank/", "run/", "loss, gradients, AdamW", (9.0, 3.55)),
    "": ("bundle/", "run/", "", (0, 0)),
    "adapter": ("run/", "lora/", "", (10.8, 2.5)),
}
"""Stage -> files it reads and writes, what it works out, and where its name stands."""


def box(axes: plt.Axes, name: str, x: float, y: float) -> None:
    """One file or folder."""
    lines = name.count("\n") + 1
    height = 0.34 + 0.26 * lines
    style = "round,pad=0.05,rounding_size=0.1"
    corner = (x - 0.62, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, 1.24, height, style, fc=STAGE, ec=INK, lw=1.2, zorder=3))
    axes.text(x, y, name, ha="center", va="center", fontsize=10, color=INK, zorder=4)


def arrow(axes: plt.Axes, start: str, end: str) -> None:
    """From file to file."""
    (x, y), (u, v) = FILES[start], FILES[end]
    ends = (x + 0.72, y + 0.15 * (v > y) - 0.15 * (v < y)), (u - 0.72, v)
    style = {"arrowstyle": "-|>", "mutation_scale": 14, "color": INK, "lw": 1.3, "zorder": 2}
    axes.add_patch(FancyArrowPatch(*ends, **style))


def main() -> None:
    """Draw the picture."""
    figure, axes = plt.subplots(figsize=(12.6, 4.6), layout="constrained")
    for left, right, color, words in (
        (0, 7.5, HOST, "host: torch, the model, once per job"),
        (7.8, 12.9, DEVICE, "device: numpy and onnxruntime, no torch"),
    ):
        axes.add_patch(
            FancyBboxPatch((left, 0.2), right - left, 4.6, "round,pad=0.05", fc=color, ec="none")
        )
        axes.text((left + right) / 2, 4.55, words, ha="center", fontsize=11.5, color=INK)
    for name, place in FILES.items():
        box(axes, name, *place)
    for stage, (start, end, words, (x, y)) in STAGES.items():
        arrow(axes, start, end)
        name = {"fontsize": 10.5, "fontweight": "bold", "va": "bottom"}
        axes.text(x, y + 0.14, stage, ha="center", color=INK, **name)
        axes.text(x, y - 0.12, words, ha="center", va="top", fontsize=8, color=INK)
    verify = "verify: the same steps in PyTorch\nand in every exported target"
    axes.text(6.4, 0.55, verify, ha="center", fontsize=8.5, color=INK, style="italic")
    use = "used with the whole\nmodel in diffusers"
    axes.text(12.0, 1.55, use, ha="center", fontsize=8.5, color=INK, style="italic")
    axes.set(xlim=(-0.1, 13.0), ylim=(0.1, 5.0))
    axes.axis("off")
    figure.savefig(Path(__file__).with_name("road.png"), dpi=110)


if __name__ == "__main__":
    main()
