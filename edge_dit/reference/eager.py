"""PyTorch's own answer: the same sub-graph, loss and AdamW in eager mode.

Everything an export is held against. `EagerSession` is a
`edge_dit_runtime.session.Trainer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from edge_dit.contract.adamw import AdamW
from edge_dit.models.checkpoint import Checkpoint
from edge_dit.models.families import family_of
from edge_dit.models.families.family import scheduler_config
from edge_dit.models.objective import Objective
from edge_dit.models.subgraph import (
    TrainableSubgraph,
    add_lora,
    as_batch,
    inner_runs,
    lora_modules,
)
from edge_dit.planning.plan import Plan, check_model


def adapted_subgraph(
    plan: Plan, check: bool = True
) -> tuple[TrainableSubgraph, dict[str, torch.Tensor]]:
    """The plan's trainable sub-graph with a fresh LoRA (A random from the plan's seed, B zero), and
    a draw with the bank's names, shapes and dtypes (its values mean nothing). Of the model's
    weights only the trained blocks, the embeddings and the head are read.

    Args:
        plan: what to train.
        check: compare the model's weights with those the plan was made for.

    Raises:
        BadInput: the model changed since the plan was made, or cannot be read.
    """
    if check:
        check_model(plan)
    family = family_of(plan.family)
    model = Checkpoint(family, plan.model).model(plan.trained)
    modules = lora_modules(family, model, plan.trained, plan.lora_targets)
    add_lora(model, modules, plan.rank, plan.alpha, plan.seed)
    subgraph = TrainableSubgraph(model, plan.family, plan.trained, plan.grid)
    return subgraph, blank_batch(plan, model)


def objective_of(plan: Plan) -> Objective:
    """What the plan's model is trained to predict."""
    return family_of(plan.family).objective(scheduler_config(plan.model))


def blank_batch(plan: Plan, model: nn.Module) -> dict[str, torch.Tensor]:
    """A draw of the plan's shapes.

    Args:
        plan: of the model.
        model: the transformer; its blocks may lie on the meta device.
    """
    family = family_of(plan.family)
    objective = objective_of(plan)
    latents, prompt = family.blank(model, plan.grid, plan.text_tokens)
    inputs = family.inputs(model, latents, objective.timestep(0.5), prompt, plan.grid)
    entry, cond = family.begin(model, inputs)
    target = objective.target(latents, torch.ones_like(latents))
    return as_batch(
        entry,
        torch.zeros_like(entry.image),
        cond,
        target,
        objective.weight(0.5),
        dict.fromkeys(inner_runs(plan.trained).values(), entry),
    )


def lora_tensors(subgraph: TrainableSubgraph) -> dict[str, np.ndarray]:
    """Copies of the LoRA tensors by diffusers name."""
    return {k: p.detach().numpy().copy() for k, p in subgraph.lora_parameters().items()}


class EagerSession:
    """A sub-graph trained by torch: a `Trainer` of `edge_dit_runtime.session`.

    Args:
        subgraph: with LoRA in place; its parameters are trained in place.
        adamw: hyper-parameters.
    """

    def __init__(self, subgraph: TrainableSubgraph, adamw: AdamW) -> None:
        self.subgraph = subgraph
        self.parameters = subgraph.lora_parameters()
        self.max_grad_norm = adamw.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=adamw.lr,
            betas=(adamw.beta1, adamw.beta2),
            eps=adamw.eps,
            weight_decay=adamw.weight_decay,
        )

    def backward(self, draw: Mapping[str, np.ndarray]) -> float:
        """Loss of one draw; keeps its gradients."""
        self.optimizer.zero_grad()
        loss = self.subgraph({name: torch.from_numpy(value) for name, value in draw.items()})
        loss.backward()
        return float(loss.detach())

    def update(self) -> None:
        """One AdamW step after clipping."""
        nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm)
        self.optimizer.step()

    def step(self, draw: Mapping[str, np.ndarray]) -> float:
        """`backward`, then `update`."""
        loss = self.backward(draw)
        self.update()
        return loss

    def gradients(self) -> dict[str, np.ndarray]:
        """Gradients of the last `backward` by LoRA name."""
        return {k: _numpy(p.grad) for k, p in self.parameters.items()}

    def adapter(self) -> dict[str, np.ndarray]:
        """A copy of the LoRA tensors."""
        return lora_tensors(self.subgraph)

    def load_adapter(self, adapter: Mapping[str, np.ndarray]) -> None:
        """Replace the LoRA tensors."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(torch.from_numpy(adapter[name]))


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy().copy()
