"""Several runs of one arm in one batch: row r belongs to run r mod R, each with a LoRA of its own.

Small models spend more time on starting operations than on arithmetic, so that eight runs together
take about half the time of eight alone. Runs do not mix: frozen weights act on rows, the loss is
the sum of the runs' losses, gradients are clipped run by run, and AdamW is elementwise. Every run
is that of `edge_dit.reference.eager.EagerSession`, to rounding (tests/samples/test_reproduce.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edge_dit.contract.adamw import CLIP_EPS, AdamW
from edge_dit.models.families.family import State
from edge_dit.models.subgraph import TrainableSubgraph, add_lora, conditioning_of, remove_lora

ROWS = 2.0
"""The factor of a row of zeros, where updates are by rows."""


class ManyLora(nn.Module):
    """A frozen linear layer or 1x1 convolution with R adapters: a [R, r, in], b [R, out, r].

    Input [k R, ..., in], or [k R, in, H, W] of a convolution.

    Attributes:
        used: how many of the ranks count, from the first; None for all.
        begun: a and b that the adapters started with, where these are not to be kept in the end.
        without_start: whether what they started with is taken away.
    """

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.used: int | None = None
        self.begun: tuple[Tensor, Tensor] | None = None
        self.without_start = False

    def forward(self, x: Tensor) -> Tensor:
        found = self.base(x)
        a, b = self.a[:, : self.used], self.b[:, :, : self.used]
        if self.without_start and self.begun is not None:
            a, b = torch.cat([a, self.begun[0]], 1), torch.cat([b, -self.begun[1]], 2)
        runs = a.shape[0]
        if isinstance(self.base, nn.Conv2d):
            delta = b @ (a @ x.reshape(-1, runs, x.shape[1], x[0, 0].numel()))
        else:
            rows = x.reshape(-1, runs, x[0, ..., 0].numel(), x.shape[-1])
            delta = rows @ a.transpose(1, 2) @ b.transpose(1, 2)
        return found + self.scale * delta.reshape(found.shape)


def add_many_lora(
    model: nn.Module,
    modules: Sequence[str],
    rank: int,
    alpha: float,
    seeds: Sequence[int],
    orthogonal: bool = False,
    ranks: Sequence[int] = (),
) -> list[ManyLora]:
    """Put adapters on ``modules``, run r's begun as `add_lora` does with ``seeds[r]``.

    Args:
        model: gets them.
        modules: names of linear layers and 1x1 convolutions.
        rank, alpha: as `add_lora` has them.
        seeds: of each run.
        orthogonal: whether A's rows are turned to be orthogonal, and keep their lengths.
        ranks: of each module, where they differ; scale and length of A's rows are those of
            ``rank``.
    """
    most = max(ranks, default=rank)
    begun: dict[int, dict[str, Tensor]] = {}
    for seed in set(seeds):
        add_lora(model, list(modules), most, alpha, seed)
        begun[seed] = {k: v.clone() for k, v in model.named_parameters() if ".lora_" in k}
        remove_lora(model)
        # PEFT would warn of it the next time
        vars(model).pop("peft_config", None)
    layers = []
    for name, own in zip(modules, ranks or [rank] * len(modules), strict=True):

        def stacked(part: str, name: str = name) -> Tensor:
            tensors = [begun[seed][f"{name}.lora_{part}.default.weight"] for seed in seeds]
            return torch.stack([tensor.flatten(1) for tensor in tensors])

        # N(0, 1 / rank), though more were drawn
        a = stacked("A")[:, :own] * (most / rank)
        if orthogonal:
            turned = torch.linalg.qr(a.transpose(1, 2)).Q.transpose(1, 2)
            a = turned * a.norm(dim=2, keepdim=True)
        layer = ManyLora(model.get_submodule(name), a, stacked("B")[:, :, :own], alpha / rank)
        model.set_submodule(name, layer)
        layers.append(layer)
    return layers


def remove_many_lora(model: nn.Module) -> None:
    """Take away what `add_many_lora` put there."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ManyLora):
            model.set_submodule(name, module.base)


def joined(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Arguments or draws of several runs as one batch; what has no batch, such as positions, is the
    same for all.
    """

    def one(values: list[Any]) -> Any:
        if not isinstance(values[0], Tensor):
            return values[0]
        if values[0].shape[0] == 1:
            return torch.cat(values)
        if not all(torch.equal(value, values[0]) for value in values[1:]):
            raise ValueError("runs whose positions differ cannot be one batch")
        return values[0]

    return {name: one([row[name] for row in rows]) for name in rows[0]}


class ManySessions:
    """R runs of one sub-graph, trained by torch in step.

    Args:
        subgraph: its blocks carry ``layers``.
        layers: as `add_many_lora` returns them.
        adamw: hyper-parameters.
        by_rows: whether the update of a row of B is multiplied by 1 / sqrt(|row| + 1 / `ROWS`^2),
            as ALLoRA does with gradients (arXiv 2410.09692). AdamW divides scales out of gradients,
            so here it is the update.
    """

    def __init__(
        self,
        subgraph: TrainableSubgraph,
        layers: list[ManyLora],
        adamw: AdamW,
        by_rows: bool = False,
    ) -> None:
        self.subgraph, self.adamw = subgraph, adamw
        self.scaled = [layer.b for layer in layers] if by_rows else []
        self.parameters = [p for layer in layers for p in (layer.a, layer.b)]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=adamw.lr,
            betas=(adamw.beta1, adamw.beta2),
            eps=adamw.eps,
            weight_decay=adamw.weight_decay,
            fused=True,
        )

    def trained(self, batch: dict[str, Tensor]) -> State:
        """The state after the last trained block, of a batch of a draw for each run."""
        graph = self.subgraph
        cond = conditioning_of(batch)
        state = State(batch["entry"], batch.get("entry_text"))
        for name in graph.order:
            state = graph.arrive(name, state, batch)
            state = graph.run(name, state, cond)
        return state

    def losses(self, draws: Sequence[dict[str, Tensor]]) -> Tensor:
        """Loss of one draw for each run, [R]."""
        graph, batch = self.subgraph, joined(draws)
        # One by one: a family's head takes a batch of one.
        last = graph.last_image(self.trained(batch), conditioning_of(batch), batch)
        return torch.stack(
            [
                graph.loss(
                    graph.family.head(graph, row[None], conditioning_of(draw), graph.grid), draw
                )
                for row, draw in zip(last, draws, strict=True)
            ]
        )

    def step(self, draws: Sequence[dict[str, Tensor]], lr: float) -> list[float]:
        """One AdamW step of every run on one draw each; the losses."""
        return self.step_of_several([draws], lr)

    def step_of_several(
        self, turns: Sequence[Sequence[dict[str, Tensor]]], lr: float
    ) -> list[float]:
        """One AdamW step of every run on several draws, one after the other; the mean losses.

        Args:
            turns: a draw for each run, in each turn.
            lr: learning rate.
        """
        self.optimizer.zero_grad()
        total = torch.zeros(len(turns[0]))
        for draws in turns:
            losses = self.losses(draws) / len(turns)
            losses.sum().backward()
            total += losses.detach()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients])
        scale = (self.adamw.max_grad_norm / (squares.sum(0).sqrt() + CLIP_EPS)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale[:, None, None])
        self.optimizer.param_groups[0]["lr"] = lr
        old = [b.detach().clone() for b in self.scaled]
        self.optimizer.step()
        with torch.no_grad():
            for b, was in zip(self.scaled, old, strict=True):
                b.sub_(was).div_((was.norm(dim=2, keepdim=True) + ROWS**-2).sqrt()).add_(was)
        return total.tolist()
