"""AdamW, said once: every target's optimiser and the PyTorch reference mean this.

    c     = min(1, max_grad_norm / (||g|| + 1e-6))          over all LoRA tensors together
    g    <- c g
    theta <- theta (1 - lr weight_decay)                    decoupled decay, before the step
    m    <- beta1 m + (1 - beta1) g
    v    <- beta2 v + (1 - beta2) g^2
    theta <- theta - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

which is ``torch.nn.utils.clip_grad_norm_`` followed by ``torch.optim.AdamW`` (arXiv 1711.05101).
"""

from __future__ import annotations

from dataclasses import dataclass

CLIP_EPS = 1e-6
"""Added to the gradient norm before dividing, as clip_grad_norm_ does."""


@dataclass(frozen=True)
class AdamW:
    """Hyper-parameters. ``lr`` is an input of every exported optimiser, the others are baked in."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
