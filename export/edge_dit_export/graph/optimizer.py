"""AdamW as a graph: plain float32 arithmetic that ONNX and ExecuTorch both have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Size, Tensor, nn

from edge_dit.contract.adamw import CLIP_EPS, AdamW
from edge_dit.contract.names import GRAD, LEARNING_RATE, NEW, STEP
from edge_dit_export.graph.trace import TracedStep, trace

ROW = 1024
"""Squares are summed in rows of this many, then over rows: runtimes that add one by one in float32
would lose digits over millions of values."""
TOGETHER = 2**18
"""Most elements updated at once, so that a runtime's scratch memory does not grow with the LoRA."""


class AdamWStep(nn.Module):
    """One update of all LoRA tensors, exactly as `edge_dit.contract.adamw` defines it.

    Tensors of one row length and learning rate are joined and updated together, up to `TOGETHER`
    elements. They are all read before any new value of theirs is computed, so a runtime may write
    the new values over the old ones.

    Args:
        adamw: hyper-parameters; ``lr`` is an input of the graph instead.
        shapes: shape of every LoRA tensor by diffusers name, in the order of the arguments.
    """

    def __init__(self, adamw: AdamW, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.adamw = adamw
        self.names = list(shapes)
        self.shapes = [Size(shape) for shape in shapes.values()]
        self.factors = [adamw.lr_factor(name) for name in self.names]
        self.groups = _groups(self.shapes, self.factors)

    def forward(self, lr: Tensor, step: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The state after one more update.

        Args:
            lr: learning rate, [1] float32.
            step: updates done so far (0 at first), [1] float32.
            tensors: parameters, gradients, then each kind of moment that is kept; each list in
                LoRA order.

        Returns:
            New parameters, then the new moments in the same order.
        """
        count = len(self.shapes)
        kinds = [tensors[start : start + count] for start in range(0, len(tensors), count)]
        hyper = self.adamw
        now = step + 1
        clip = self._clip(kinds[1])
        unbias = _bias_correction(hyper.beta1, now) if hyper.beta1 else 1
        correction = _bias_correction(hyper.beta2, now)
        # Of each rate once, so that groups of one rate share the nodes.
        rates = {
            factor: lr * factor if factor != 1 else lr for factor in dict.fromkeys(self.factors)
        }
        sizes = {
            factor: (1 - rate * hyper.weight_decay, rate / unbias) for factor, rate in rates.items()
        }
        new: dict[tuple[int, int], Tensor] = {}
        for group in self.groups:
            parameter, gradient, *means, square = (_joined(kind, group) for kind in kinds)
            gradient = gradient * clip
            means = [mean * hyper.beta1 + gradient * (1 - hyper.beta1) for mean in means]
            square = square * hyper.beta2 + gradient * gradient * (1 - hyper.beta2)
            unbiased = torch.sqrt(square / correction)
            keep, step_size = sizes[self.factors[group[0]]]
            mean = means[0] if means else gradient
            parameter = parameter * keep - step_size * mean / (unbiased + hyper.eps)
            rows = [self.shapes[index][0] for index in group]
            for kind, joined in enumerate((parameter, *means, square)):
                for index, part in zip(group, torch.split(joined, rows), strict=True):
                    new[kind, index] = part
        return tuple(new[key] for key in sorted(new))

    def _clip(self, gradients: Sequence[Tensor]) -> Tensor:
        """Factor in (0, 1] that brings the norm down to max_grad_norm, [1]."""
        rows = [_squares(_joined(gradients, group)) for group in self.groups]
        norm = torch.sqrt(torch.cat(rows).sum(dim=0, keepdim=True))
        return torch.clamp(self.adamw.max_grad_norm / (norm + CLIP_EPS), max=1.0)


def _groups(shapes: Sequence[Size], factors: Sequence[float]) -> list[list[int]]:
    """Numbers of the tensors in each group. Tensors of a group have one factor and differ in their
    first dimension only; a group has at most `TOGETHER` elements, or is a single tensor.
    """
    alike: dict[tuple[Size, float], list[list[int]]] = {}
    for index, (shape, factor) in enumerate(zip(shapes, factors, strict=True)):
        groups = alike.setdefault((shape[1:], factor), [])
        filled = sum(shapes[i].numel() for i in groups[-1]) if groups else TOGETHER
        if filled + shape.numel() > TOGETHER:
            groups.append([])
        groups[-1].append(index)
    return [group for groups in alike.values() for group in groups]


def _joined(tensors: Sequence[Tensor], group: Sequence[int]) -> Tensor:
    """The tensors of a group, joined along the first dimension."""
    return torch.cat([tensors[index] for index in group])


def _squares(joined: Tensor) -> Tensor:
    """Sum of squares of every `ROW` elements, [rows]."""
    flat = joined.reshape(-1)
    padded = torch.cat([flat, flat.new_zeros(-flat.numel() % ROW)])
    return (padded * padded).reshape(-1, ROW).sum(dim=1)


def trace_optimizer(step: AdamWStep) -> TracedStep:
    """Trace an update.

    Returns:
        inputs: "lr", "step", then "<lora>", "grad.<lora>", "exp_avg.<lora>", "exp_avg_sq.<lora>",
        each for all LoRA tensors; outputs: "new.<lora>", "new.exp_avg.<lora>",
        "new.exp_avg_sq.<lora>". Without "exp_avg." where it is not kept.
    """
    kinds = ("", GRAD, *step.adamw.moments)
    shapes = dict(zip(step.names, step.shapes, strict=True))
    inputs = {LEARNING_RATE: torch.ones(1), STEP: torch.ones(1)} | {
        kind + name: torch.zeros(shape) for kind in kinds for name, shape in shapes.items()
    }
    outputs = [NEW + kind + name for kind in kinds if kind != GRAD for name in shapes]
    module = trace(lambda tensors: step(*tensors.values()), inputs)
    return TracedStep(module, inputs, outputs)


def _bias_correction(beta: float, step: Tensor) -> Tensor:
    """1 - beta^t of step t, [1].

    With y = -t ln(beta) it is 1 - e^-y = 2 tanh(y/2) / (1 + tanh(y/2)), which keeps all digits of
    float32; 1 - pow(beta, t) keeps four of them at t = 1 and beta = 0.999, and ONNX has no expm1.
    """
    half = torch.tanh(step * (-math.log(beta) / 2))
    return 2 * half / (1 + half)
