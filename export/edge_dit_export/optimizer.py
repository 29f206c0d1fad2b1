"""AdamW as a graph: plain float32 arithmetic that ONNX and ExecuTorch both have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Size, Tensor, nn

from edge_dit.adamw import CLIP_EPS, AdamW
from edge_dit_export.trace import TracedStep, trace

ROW = 1024
"""Squares are summed in rows of this many, then over rows: runtimes that add one by one in float32
would lose digits over millions of values."""


class AdamWStep(nn.Module):
    """One update of all LoRA tensors, `edge_dit.adamw` to the letter.

    The tensors are laid end to end, so the graph's arithmetic does not grow with their number.

    Args:
        adamw: hyper-parameters; ``lr`` is an input of the graph instead.
        shapes: shape of every LoRA tensor by diffusers name, in the order of the arguments.
    """

    def __init__(self, adamw: AdamW, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.adamw = adamw
        self.names = list(shapes)
        self.shapes = [Size(shape) for shape in shapes.values()]
        self.sizes = [shape.numel() for shape in self.shapes]

    def forward(self, lr: Tensor, step: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The state after one more update.

        Args:
            lr: learning rate, [1] float32.
            step: updates done so far (0 at first), [1] float32.
            tensors: parameters, gradients, first moments, second moments; each list in LoRA order.

        Returns:
            New parameters, new first moments, new second moments; each list in LoRA order.
        """
        count = len(self.shapes)
        parameter, gradient, mean, square = (
            torch.cat([tensor.reshape(-1) for tensor in tensors[start : start + count]])
            for start in range(0, 4 * count, count)
        )
        hyper = self.adamw
        gradient = gradient * self._clip(gradient)
        mean = mean * hyper.beta1 + gradient * (1 - hyper.beta1)
        square = square * hyper.beta2 + gradient * gradient * (1 - hyper.beta2)
        now = step + 1
        unbiased = torch.sqrt(square / _bias_correction(hyper.beta2, now))
        parameter = parameter * (1 - lr * hyper.weight_decay)
        step_size = lr / _bias_correction(hyper.beta1, now)
        parameter = parameter - step_size * mean / (unbiased + hyper.eps)
        return (*self._cut(parameter), *self._cut(mean), *self._cut(square))

    def _clip(self, gradient: Tensor) -> Tensor:
        """Factor in (0, 1] that brings the norm down to max_grad_norm, [1]."""
        padded = torch.cat([gradient, gradient.new_zeros(-gradient.numel() % ROW)])
        rows = (padded * padded).reshape(-1, ROW).sum(dim=1)
        norm = torch.sqrt(rows.sum(dim=0, keepdim=True))
        return torch.clamp(self.adamw.max_grad_norm / (norm + CLIP_EPS), max=1.0)

    def _cut(self, flat: Tensor) -> list[Tensor]:
        parts = torch.split(flat, self.sizes)
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]


def trace_optimizer(step: AdamWStep) -> TracedStep:
    """Trace an update.

    Returns:
        inputs: "lr", "step", then "<lora>", "grad.<lora>", "exp_avg.<lora>", "exp_avg_sq.<lora>",
        each of all LoRA tensors; outputs: "new.<lora>", "new.exp_avg.<lora>",
        "new.exp_avg_sq.<lora>".
    """
    kinds = ("", "grad.", "exp_avg.", "exp_avg_sq.")
    shapes = dict(zip(step.names, step.shapes, strict=True))
    inputs = {"lr": torch.ones(1), "step": torch.ones(1)} | {
        kind + name: torch.zeros(shape) for kind in kinds for name, shape in shapes.items()
    }
    outputs = [f"new.{kind}{name}" for kind in kinds if kind != "grad." for name in shapes]
    module = trace(lambda tensors: step(*tensors.values()), inputs)
    return TracedStep(module, inputs, outputs)


def _bias_correction(beta: float, step: Tensor) -> Tensor:
    """1 - beta^t of step t, [1].

    With y = -t ln(beta) it is 1 - e^-y = 2 tanh(y/2) / (1 + tanh(y/2)), which keeps all digits of
    float32; 1 - pow(beta, t) keeps four of them at t = 1 and beta = 0.999, and ONNX has no expm1.
    """
    half = torch.tanh(step * (-math.log(beta) / 2))
    return 2 * half / (1 + half)
