"""AdamW, as every target's optimizer and the PyTorch reference compute it.

    c     = min(1, max_grad_norm / (||g|| + 1e-6))          over all LoRA tensors together
    g    <- c g
    theta <- theta (1 - lr weight_decay)                    decoupled decay, before the step
    m    <- beta1 m + (1 - beta1) g
    v    <- beta2 v + (1 - beta2) g^2
    theta <- theta - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

In the last and the third line, lr is ``loraplus_lr_ratio`` times as large for LoRA B (LoRA+, arXiv
2402.12354, as peft's ``create_loraplus_optimizer``).

This is ``torch.nn.utils.clip_grad_norm_`` followed by ``torch.optim.AdamW`` (arXiv 1711.05101).
With beta1 = 0 the first moment m is the gradient itself, and nothing of it is kept between steps:
half of the state. That is RMSprop with bias correction and decoupled decay; Adafactor leaves the
first moment out by default too (arXiv 1804.04235 sec. 6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from edge_dit.contract.names import MOMENTS, is_b
from edge_dit.store.documents import STRICT

CLIP_EPS = 1e-6
"""Added to the gradient norm before dividing, as clip_grad_norm_ does."""


DECAY_SHARE = 0.4
"""Share of a run's steps, at its end, over which the learning rate falls."""


Schedule = Literal["decay", "constant", "linear", "cosine"]


def learning_rate(
    step: int, steps: int, lr: float, schedule: Schedule = "decay", warmup: int = 0
) -> float:
    """Learning rate of a step.

        decay      ``lr``, falling linearly towards 0 over the last `DECAY_SHARE` of the steps
        constant   ``lr``
        linear     falling linearly towards 0 over all steps
        cosine     lr (1 + cos(pi step / steps)) / 2 (arXiv 1608.03983)

    With one draw a step the gradient is noisy. Smaller steps at the end average the noise out,
    which shows in the pictures (warm-up-stable-decay, arXiv 2404.06395 sec. 4).

    Args:
        step: steps done so far, from 0.
        steps: steps of the whole run.
        lr: the job's learning rate.
        schedule: its course.
        warmup: first steps, over which it rises linearly from lr / (warmup + 1).
    """
    course = 1.0
    if schedule == "decay":
        course = min(1.0, (steps - step) / (DECAY_SHARE * steps))
    elif schedule == "linear":
        course = (steps - step) / steps
    elif schedule == "cosine":
        course = (1 + math.cos(math.pi * step / steps)) / 2
    return lr * course * min(1.0, (step + 1) / (warmup + 1))


@dataclass(frozen=True)
class AdamW:
    """Hyper-parameters, as a plan and a bundle's manifest store them. ``lr`` is an input of every
    exported optimizer; the others are constants of its graph.

    ``eps`` is 1e-6, not torch's 1e-8. Clipped gradients have norm 1 at most, so rounding errors in
    their elements reach 1e-9. With a smaller eps, rounding would decide whole steps wherever a
    gradient is nearly zero, and two correct runtimes would drift apart.
    """

    __pydantic_config__ = STRICT
    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    loraplus_lr_ratio: float = 1.0

    @property
    def moments(self) -> tuple[str, ...]:
        """Those of `MOMENTS` that are kept from step to step."""
        return MOMENTS if self.beta1 else MOMENTS[1:]

    def lr_factor(self, name: str) -> float:
        """Factor of the learning rate of a LoRA tensor, by its diffusers name."""
        return self.loraplus_lr_ratio if is_b(name) else 1.0
