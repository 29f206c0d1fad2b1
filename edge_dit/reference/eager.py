"""PyTorch's own training step: the same sub-graph, loss and AdamW in eager mode.

Exports are compared with it. `EagerSession` is a `edge_dit_runtime.session.Session`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from edge_dit.contract.adamw import AdamW
from edge_dit.contract.names import ADAPTED, MOMENTS, STEP, STORED
from edge_dit.contract.objective import Objective, weight_of
from edge_dit.models.model import Model
from edge_dit.models.subgraph import (
    TrainableSubgraph,
    add_lora,
    as_batch,
    inner_runs,
    lora_modules,
)
from edge_dit.pictures.masks import of_tokens
from edge_dit.planning.plan import Plan


def adapted_subgraph(plan: Plan, model: Model) -> tuple[TrainableSubgraph, dict[str, torch.Tensor]]:
    """The plan's trainable sub-graph with a fresh LoRA, and a draw of its shapes (`blank_batch`).

    LoRA A is random from the plan's seed, B is zero. Of the model's weights only those of blocks
    that run, the embeddings and the head are read.

    Args:
        plan: what to train.
        model: of the plan, from `edge_dit.planning.plan.model_of`.

    Raises:
        BadInput: the model's weights cannot be read.
    """
    family, trained = model.family, plan.trained
    transformer = model.checkpoint().model(plan.running)
    modules = lora_modules(family, transformer, trained, plan.lora_targets, plan.tail)
    add_lora(transformer, modules, plan.rank, plan.alpha, plan.seed)
    subgraph = TrainableSubgraph(transformer, family, trained, plan.grid, plan.tail)
    return subgraph, blank_batch(plan, model)


def blank_batch(plan: Plan, model: Model) -> dict[str, torch.Tensor]:
    """A draw with the names, shapes and dtypes of the plan's bank, of zeros. No weight is read.

    Args:
        plan: of the bank.
        model: of the plan.
    """
    objective = model.objective  # here: its scheduler computes with numbers
    with torch.device("meta"), model.family.traceable():
        batch = _blank(plan, model, objective)
    return {name: torch.zeros_like(tensor, device="cpu") for name, tensor in batch.items()}


def _blank(plan: Plan, model: Model, objective: Objective) -> dict[str, torch.Tensor]:
    """`blank_batch` on the meta device."""
    family, transformer = model.family, model.meta()
    latents, prompt = family.blank(transformer, plan.grid, plan.text_tokens)
    inputs = family.inputs(transformer, latents, objective.timestep(0.5), prompt, plan.grid)
    entry, cond = family.begin(transformer, inputs)
    names = family.block_names(model.config)
    if plan.surroundings:
        running = [names[number] for number in plan.running]
        side, whole = plan.grid[0], plan.passing_grid[0]
        cond |= family.blank_surroundings(transformer, running, side, whole)
    return as_batch(
        entry,
        torch.zeros_like(entry.image) if plan.tail == STORED else None,
        plan.reads(names, cond),
        objective.target(latents, torch.ones_like(latents)),
        _blank_weight(plan, model, latents),
        dict.fromkeys(inner_runs(plan.trained).values(), entry),
    )


def _blank_weight(plan: Plan, model: Model, latents: torch.Tensor) -> float | torch.Tensor | None:
    """The weight of a draw that weighs 1, in the form of the plan's draws.

    Args:
        plan: of the bank.
        model: of the plan.
        latents: shaped as the draw's.
    """
    if plan.masked:
        patch = np.ones((plan.s_min, plan.s_min), np.float32)
        return torch.from_numpy(of_tokens(patch, plan.grid, latents.shape))
    return weight_of(model.objective.weight(0.5), 1.0, plan.weighted)


def lora_tensors(subgraph: TrainableSubgraph) -> dict[str, np.ndarray]:
    """Copies of the LoRA tensors by diffusers name."""
    return {name: copied(tensor) for name, tensor in subgraph.lora_parameters().items()}


def copied(tensor: Any) -> np.ndarray:
    """A tensor's values as an array of its own."""
    return tensor.detach().numpy().copy()


class ClippedAdamW:
    """torch.optim.AdamW after clipping, with the hyper-parameters that host and device share.

    Args:
        parameters: trained in place, by LoRA name.
        adamw: hyper-parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], adamw: AdamW) -> None:
        self.parameters = list(parameters.values())
        self.max_grad_norm = adamw.max_grad_norm
        self.factors = [adamw.lr_factor(name) for name in parameters]
        self.optimizer = torch.optim.AdamW(
            [{"params": [parameter]} for parameter in self.parameters],
            lr=adamw.lr,
            betas=(adamw.beta1, adamw.beta2),
            eps=adamw.eps,
            weight_decay=adamw.weight_decay,
        )

    def backward(self, loss: torch.Tensor) -> float:
        """Replace the gradients by those of ``loss``, a scalar; its value."""
        self.optimizer.zero_grad()
        loss.backward()
        return float(loss.detach())

    def step(self, lr: float) -> None:
        """Clip the norm of all gradients together, then take one AdamW step."""
        for group, factor in zip(self.optimizer.param_groups, self.factors, strict=True):
            group["lr"] = lr * factor
        nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()


class EagerSession:
    """A sub-graph trained by torch: a `Session` of `edge_dit_runtime.session`.

    Args:
        subgraph: with LoRA in place; its parameters are trained in place.
        adamw: hyper-parameters.
    """

    def __init__(self, subgraph: TrainableSubgraph, adamw: AdamW) -> None:
        self.subgraph = subgraph
        self.parameters = subgraph.lora_parameters()
        self.optimizer = ClippedAdamW(self.parameters, adamw)
        self.moments = adamw.moments
        self.lr = adamw.lr

    def backward(self, draw: Mapping[str, np.ndarray]) -> float:
        """Loss of one draw; its gradients are kept."""
        batch = {name: torch.from_numpy(value) for name, value in draw.items()}
        return self.optimizer.backward(self.subgraph(batch))

    def update(self) -> None:
        """One AdamW step with the kept gradients, after clipping."""
        self.optimizer.step(self.lr)

    def step(self, draw: Mapping[str, np.ndarray]) -> float:
        """`backward`, then `update`; the loss before the update."""
        loss = self.backward(draw)
        self.update()
        return loss

    def gradients(self) -> dict[str, np.ndarray]:
        """Gradients of the last `backward` by LoRA name."""
        return {name: copied(parameter.grad) for name, parameter in self.parameters.items()}

    def set_gradients(self, gradients: Mapping[str, np.ndarray]) -> None:
        """Replace the gradients of the last `backward`."""
        for name, parameter in self.parameters.items():
            parameter.grad = torch.from_numpy(gradients[name])

    def adapter(self) -> dict[str, np.ndarray]:
        """A copy of the LoRA tensors by name."""
        return lora_tensors(self.subgraph)

    def load_adapter(self, adapter: Mapping[str, np.ndarray]) -> None:
        """Replace the LoRA tensors."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(torch.from_numpy(adapter[name]))

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of adapter and moments, float32, and "step", int64 [1]; after an update."""
        kept = self.optimizer.optimizer.state
        state = {ADAPTED + name: value for name, value in self.adapter().items()}
        for name, parameter in self.parameters.items():
            state |= {kind + name: copied(kept[parameter][kind[:-1]]) for kind in self.moments}
            state[STEP] = np.array([int(kept[parameter][STEP])], np.int64)
        return state

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from a `state_dict`."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(torch.from_numpy(state[ADAPTED + name]))
            self.optimizer.optimizer.state[parameter] = {
                STEP: torch.tensor(float(state[STEP][0])),
                # torch keeps a first moment even where beta1 is 0
                **{kind[:-1]: torch.zeros_like(parameter) for kind in MOMENTS},
                **{kind[:-1]: torch.from_numpy(state[kind + name].copy()) for kind in self.moments},
            }
