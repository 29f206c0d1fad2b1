"""Inputs and optimizer states that no training run of 20 steps shows, made for verify.

A draw of a bank varies little: its text mask may be all ones, its gradient may never be clipped,
the learning rate of the first steps is one number. So two draws are changed in every input
(`varied`), and the optimizer does single updates from made-up states (`PROBES`). Both are the same
for PyTorch and for a target, because they follow from fixed seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edge_dit.contract.names import ADAPTED, MOMENTS, STEP, TARGET
from edge_dit.pictures.crop import CropRule
from edge_dit_runtime.sessions.trainer import Tensors

VARIATIONS = 2
"""Draws that are compared with every input changed."""
SPREAD = 0.5
"""Size of a change, in standard deviations of the input."""
MASK = "mask"
"""End of the names of masks, before a block's. Their values say nothing of a change's size."""
SIZES = ((0, 0), (9, 5), (0, 64), (128, 3))
"""Rows and columns that an image of the patch sampler has beyond s_max."""
PLACES = (
    (0.0, 0.2, 0.9),
    (0.37, 0.6, 0.1),
    (0.83, 1.0, 0.0),
    (1.0, 0.5, 0.5),
    (0.0, 1.0, 1.0),
    (0.0, 0.0, 0.0),
    (0.62, 0.0, 1.0),
)
"""(sigma, u, v) of patches that are compared in an image of each size, all borders among them."""
ANYWHERE = 16
"""Further patches in each image, at random."""
BELOW = 0.02
"""How far below a step a value lies that is about to be rounded: crop sides are rounded to a
multiple, positions to a pixel. Whatever is a little too large then goes a step further.
"""


@dataclass(frozen=True)
class Probe:
    """One update of the optimizer from a made-up state.

    Attributes:
        name: in the certificate.
        shows: what a wrong optimizer would do otherwise, in words.
        lr: learning rate.
        step: updates done before.
        adapter: standard deviation of the LoRA tensors; at 0 all gradients are zero.
        first: standard deviation of the first moments.
        second: size of the numbers whose squares are the second moments.
        target: the draw's target is multiplied by this, which inflates the gradients.
    """

    name: str
    shows: str
    lr: float
    step: int
    adapter: float
    first: float
    second: float
    target: float = 1.0

    def state(self, adapter: Mapping[str, np.ndarray]) -> Tensors:
        """The state, as `Session.load_state_dict` takes it.

        Args:
            adapter: LoRA tensors by name; their shapes are used.
        """
        rng = np.random.default_rng(self.step)
        state: Tensors = {STEP: np.array([self.step], np.int64)}
        for name, value in sorted(adapter.items()):
            lora, first, second = rng.normal(size=(3, *value.shape))
            moments = self.first * first, (self.second * (1 + np.abs(second))) ** 2
            kinds = zip((ADAPTED, *MOMENTS), (self.adapter * lora, *moments), strict=True)
            state |= {kind + name: array.astype(np.float32) for kind, array in kinds}
        return state

    def draw(self, stored: Mapping[str, np.ndarray]) -> Tensors:
        """The draw to step at, made out of a stored one."""
        return {**stored, TARGET: stored[TARGET] * np.float32(self.target)}


PROBES = (
    Probe("clipped", "clipping, and the first update", 3e-4, 0, 0.02, 0.0, 0.0, 1e3),
    Probe("decayed", "weight decay, a late update", 10.0, 9999, 0.1, 1e-3, 1.0),
    Probe("early", "betas and bias corrections", 0.1, 4, 0.1, 1.0, 1.0),
    Probe("zero gradient", "gradients of zero, and eps", 1.0, 99, 0.0, 1e-6, 1e-6),
)
"""Together they take every branch of `edge_dit.contract.adamw`, at four learning rates."""


def varied(draw: Mapping[str, np.ndarray], seed: int) -> Tensors:
    """A draw with every input changed: a graph that ignores one, or has one baked in, shows.

    Args:
        draw: batch tensors by name, float32.
        seed: of the change.
    """
    rng = np.random.default_rng(seed)
    changed = {}
    for name, value in sorted(draw.items()):
        masks = any(part.endswith(MASK) for part in name.split("."))
        size = 1.0 if masks else float(value.std()) or 1.0
        noise = rng.normal(0, SPREAD * size, value.shape)
        changed[name] = (value + noise).astype(np.float32)
    return changed


def sampler_inputs(rule: CropRule) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Image [1, 3, H, W], sigma [1] and uv [2], float32, of every patch that is compared.

    Args:
        rule: of the plan's crops.
    """
    s_min, s_max, multiple = rule.s_min, rule.s_max, rule.multiple
    rng = np.random.default_rng(0)
    sides = np.arange(s_min, s_max, multiple)[[0, -1]] if s_max > s_min else np.empty(0)
    levels = (sides - s_min + (0.5 - BELOW) * multiple) / max(s_max - s_min, 1)
    inputs = []
    for rows, columns in SIZES:
        image = rng.uniform(-1, 1, (1, 3, s_max + rows, s_max + columns)).astype(np.float32)
        # At sigma = 1 the crop's side is s_max, so that these are the free rows and columns.
        u, v = ((free - BELOW) / (free + 1) if free else 0.5 for free in (columns, rows))
        edges = [(1.0, u, v), *((level, 0.5, 0.5) for level in levels)]
        for sigma, u, v in (*PLACES, *edges, *rng.uniform(size=(ANYWHERE, 3))):
            inputs.append((image, np.array([sigma], np.float32), np.array([u, v], np.float32)))
    return inputs
