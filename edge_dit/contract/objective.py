"""What a model is trained to predict, and at which noise levels; of torch tensors or numpy arrays.

In every family the noise level ``sigma`` of a draw is t / T in (0, 1], the argument of Eq. 1.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np

Array = Any
"""A torch tensor or a numpy array, float32."""


class FlowMatching:
    """x_t = (1 - sigma) x_0 + sigma eps, target eps - x_0 (arXiv 2210.02747).

    Args:
        sigmas: noise levels of the checkpoint's scheduler, ascending in (0, 1], float32 [T].
        logit_normal: draw noise levels from sigmoid(N(0, 1)) over the table instead of evenly.
        precondition: take the loss of the predicted image: sigma^2 times that of the velocity.
    """

    def __init__(
        self, sigmas: np.ndarray, logit_normal: bool = False, precondition: bool = False
    ) -> None:
        self.sigmas = sigmas
        self.logit_normal = logit_normal
        self.precondition = precondition

    def level(self, share: float) -> float:
        """The noise level below which a ``share`` in [0, 1) of the training density lies."""
        if self.logit_normal:
            share = float(1 / (1 + np.exp(-NormalDist().inv_cdf(min(max(share, 1e-6), 1 - 1e-6)))))
        return float(self.sigmas[int(share * len(self.sigmas))])

    def timestep(self, sigma: float) -> float:
        """The pipeline's timestep of a noise level: sigma T."""
        return sigma * len(self.sigmas)

    def noised(self, clean: Array, noise: Array, sigma: float) -> Array:
        """The noised latents x_t."""
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: Array, noise: Array) -> Array:
        """The velocity eps - x_0."""
        return noise - clean

    def clean(self, target: Array, noise: Array) -> Array:
        """The clean latents x_0 of a target."""
        return noise - target

    def weight(self, sigma: float) -> float | None:
        """Weight of a draw's loss; None if every draw weighs 1."""
        return sigma**2 if self.precondition else None


class EpsilonPrediction:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps, target eps (arXiv 2006.11239).

    Args:
        alphas_cumprod: a_t of the checkpoint's scheduler by timestep, [T].
    """

    def __init__(self, alphas_cumprod: np.ndarray) -> None:
        steps = len(alphas_cumprod)
        self.alphas_cumprod = alphas_cumprod
        self.sigmas = (np.arange(1, steps + 1) / steps).astype(np.float32)

    def level(self, share: float) -> float:
        """The noise level below which a ``share`` in [0, 1) of the even training density lies."""
        return float(self.sigmas[int(share * len(self.sigmas))])

    def timestep(self, sigma: float) -> float:
        """The scheduler's timestep of a noise level, a whole number in 0 .. T - 1."""
        return float(max(0, round(sigma * len(self.sigmas)) - 1))

    def noised(self, clean: Array, noise: Array, sigma: float) -> Array:
        """The noised latents x_t."""
        alpha = float(self.alphas_cumprod[int(self.timestep(sigma))])
        return alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise

    def target(self, clean: Array, noise: Array) -> Array:
        """The noise eps."""
        return noise

    def clean(self, target: Array, noise: Array) -> None:
        """None: the target says nothing of the clean latents."""

    def weight(self, sigma: float) -> float | None:
        """None: every draw weighs 1."""
        return None


Objective = FlowMatching | EpsilonPrediction


def weight_of(objective: float | None, picture: float, weighted: bool) -> float | None:
    """Weight of a draw's loss; None if every draw weighs 1.

    Args:
        objective: its `weight`.
        picture: weight of the draw's picture.
        weighted: whether pictures have weights in this plan.
    """
    return objective if not weighted else picture * (1.0 if objective is None else objective)
