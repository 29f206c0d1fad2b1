"""Where a wrong export is most likely wrong: with which other weights PyTorch computes the same.

A fault in one module shows in the gradients of all others: through attention most in its
neighbours', not in its own. So of each frozen module of PyTorch's sub-graph in turn, weights are
searched with which PyTorch computes the wrong loss and gradients that were measured. The module
with which that succeeds best is where to look first. If none does well, the fault may lie between
modules: then something to add to a module's input or output is searched.

A fault of the backward pass alone leaves the loss right, and no weights explain it. It spoils the
gradients of what is called before it, and those behind it stay right: that gives the place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from edge_dit.contract.adapter import PREFIX
from edge_dit.models.subgraph import TrainableSubgraph

ALONE = 0.02
"""If all other gradients have at most this share of the worst error, the fault is in that gradient
alone."""
ROUNDING = 1e-5
"""Errors below this share of a tensor need no explanation."""
LOSS_RIGHT = 1e-6
"""Largest relative error of a loss that is right to rounding."""
EXPLAINED = 0.1
"""Share of the squared errors that may be left where a module's weights explain them."""
STEP = 1e-3
"""Length of a trial step, relative to a module's weights."""
CANDIDATES, ROUNDS = 5, 6
"""Modules whose first step helps most, and how many steps of L-BFGS these get."""
PASSES = 5
"""Forward and backward passes that a step of L-BFGS takes about as long as."""
MOST_SECONDS = 150.0
"""Longest time of a search, of which there are two. A model of real size would take hours; nothing
is said of where its fault is but the gradients themselves.
"""
LORA, BASE = ".lora_", ".base_layer"
OF_MODULE = f"gradients.{PREFIX}"
"""Before the name of a gradient's module."""
Arrays = Mapping[str, np.ndarray]
Places = dict[tuple[str, str], list[Tensor]]
"""What may be other than it should: (module, which of its states) -> tensors."""
Found = tuple[float, str]
"""Share of the squared errors that is left, and the module of the place; none if the search would
take longer than `MOST_SECONDS`.
"""


@dataclass(frozen=True)
class Suspect:
    """Where to look first.

    Attributes:
        likely: module; empty if nothing but the gradients themselves can be said.
        beside: modules with LoRA that are nearest to it, or itself.
    """

    likely: str = ""
    beside: Sequence[str] = ()


@dataclass(frozen=True)
class Modules:
    """The modules of a sub-graph's blocks ("transformer_blocks.1.attn1.to_q").

    Attributes:
        calls: of each block, (module, whether it carries LoRA) in the order of calls.
    """

    calls: Mapping[str, Sequence[tuple[str, bool]]]

    def beside(self, module: str) -> list[str]:
        """The module itself, if it carries LoRA. Else the nearest that do: of its block, the last
        run of LoRA modules before it and the first behind it, where a run is not interrupted by a
        module without LoRA. A module that no block calls has none.
        """
        for calls in self.calls.values():
            names = [name for name, _ in calls]
            if module in names:
                place = names.index(module)
                if calls[place][1]:
                    return [module]
                return [*_run(calls[:place][::-1]), *_run(calls[place + 1 :])]
        return []

    def behind(self, wrong: set[str]) -> Suspect:
        """Where a fault of the backward pass begins: between the last module of ``wrong``, in the
        order of calls, and the one called next.
        """
        names = [name for calls in self.calls.values() for name, _ in calls]
        last = max((names.index(name) for name in wrong if name in names), default=-1)
        return Suspect(names[last + 1], [names[last]]) if 0 <= last < len(names) - 1 else Suspect()


def _run(calls: Sequence[tuple[str, bool]]) -> Iterator[str]:
    """The first run of modules that carry LoRA."""
    begun = False
    for name, carries in calls:
        if carries:
            begun = True
            yield name
        elif begun:
            return


def called_modules(subgraph: TrainableSubgraph, compute: Callable[[], object]) -> Modules:
    """The modules without children, and those with LoRA, in the order in which they are called.

    Args:
        subgraph: with LoRA in place.
        compute: runs the sub-graph.
    """
    calls: dict[str, list[tuple[str, bool]]] = {block: [] for block in subgraph.order}
    handles = []
    carriers = {n.split(LORA)[0] for n, _ in subgraph.named_parameters() if LORA in n}
    for block, called in calls.items():
        for name, module in subgraph.get_submodule(block).named_modules(prefix=block):
            inside = LORA in name or BASE in name
            if not inside and (name in carriers or not list(module.children())):

                def note(*_: object, called=called, entry=(name, name in carriers)) -> None:
                    if entry not in called:
                        called.append(entry)

                handles.append(module.register_forward_hook(note))
    compute()
    for handle in handles:
        handle.remove()
    return Modules(calls)


def suspect(
    subgraph: TrainableSubgraph,
    modules: Modules,
    draw: Arrays,
    right: Arrays,
    measured: Arrays,
    tolerance: float,
) -> Suspect:
    """Where the fault is most likely that made these gradients wrong.

    Args:
        subgraph: with the adapter in place that they are of; the same again afterwards.
        modules: from `called_modules`.
        draw: that they are of.
        right, measured: PyTorch's and the target's "loss" and "gradients.<name>".
        tolerance: of gradients. Those within a tenth of it are right.
    """
    names = ["loss", *(f"gradients.{name}" for name in subgraph.lora_parameters())]
    if not all(n in measured and measured[n].shape == right[n].shape for n in names):
        return Suspect()
    errors = {name: _relative(right[name], measured[name]) for name in names}
    loss = errors.pop("loss")
    worst = max(errors, key=lambda name: errors[name]).split(LORA)[0]
    others = [error for name, error in errors.items() if not name.startswith(worst + LORA)]
    alone = max(others, default=0) <= ALONE * max(errors.values())
    if alone or not all(np.isfinite(measured[name]).all() for name in names):
        return Suspect()  # the former is how no fault of the forward pass looks
    batch = {name: torch.from_numpy(value) for name, value in draw.items()}
    search = _Search(subgraph, batch, [torch.from_numpy(measured[n]) for n in names])
    left, likely = search.of_weights()
    if left > EXPLAINED and loss <= LOSS_RIGHT:
        wrong = {name for name, error in errors.items() if error > tolerance / 10}
        return modules.behind({n.split(LORA)[0].removeprefix(OF_MODULE) for n in wrong})
    if left > EXPLAINED:
        called = [name for calls in modules.calls.values() for name, _ in calls]
        left, likely = min((left, likely), search.of_states(called))
    return Suspect(likely, modules.beside(likely))


def _relative(right: np.ndarray, measured: np.ndarray) -> float:
    return float(np.abs(measured - right).max() / max(np.abs(right).max(), 1e-30))


class _Search:
    """Searches other values of one place at a time that explain wrong results.

    Args:
        subgraph: with LoRA in place.
        batch: of the draw.
        wrong: loss and gradients, in the order of the LoRA parameters.
    """

    def __init__(
        self, subgraph: TrainableSubgraph, batch: dict[str, Tensor], wrong: Sequence[Tensor]
    ) -> None:
        self.subgraph, self.batch, self.wrong = subgraph, batch, wrong
        self.parameters = list(subgraph.lora_parameters().values())
        started = time.monotonic()
        right = self._results()
        self.seconds = time.monotonic() - started
        self.scales = [
            ((a - b).square().sum() + (ROUNDING * b).square().sum()).sqrt().clamp(min=1e-30)
            for a, b in zip(wrong, right, strict=True)
        ]

    def of_weights(self) -> Found:
        """The module whose weights explain most."""
        weights: Places = {}
        for name, weight in self.subgraph.named_parameters():
            if LORA not in name:
                module = name.replace(BASE, "").rpartition(".")[0]
                weights.setdefault((module, ""), []).append(weight)
        return self._best(weights)

    def of_states(self, modules: Sequence[str]) -> Found:
        """The module of which an input or output, if something were added to it, explains most."""
        added: Places = {}

        def add(state: Any, place: tuple[str, str]) -> Any:
            if not isinstance(state, Tensor) or not state.is_floating_point():
                return state
            (more,) = added.setdefault(place, [torch.zeros(state.shape)])
            return state + more if more.shape == state.shape else state

        handles = []
        for name in modules:
            module = self.subgraph.get_submodule(name)
            given = partial(_given, add, (name, "input"))
            made = partial(_made, add, (name, "output"))
            handles += [module.register_forward_pre_hook(given), module.register_forward_hook(made)]
        try:
            self._results()
            return self._best(added)
        finally:
            for handle in handles:
                handle.remove()

    def _best(self, places: Places) -> Found:
        passes = len(places) + PASSES * CANDIDATES * ROUNDS
        if passes * self.seconds > MOST_SECONDS:
            return 1.0, ""
        return min((self._fit(places[place]), place[0]) for place in self._candidates(places))

    def _results(self, again: bool = False) -> list[Tensor]:
        """Loss and gradients; differentiable if ``again``."""
        with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
            loss = self.subgraph(self.batch)
            results = [loss, *torch.autograd.grad(loss, self.parameters, create_graph=again)]
        return results if again else [result.detach() for result in results]

    def _errors(self, again: bool = False) -> Tensor:
        """What is not explained: of each tensor its errors over `scales`, in one vector."""
        rows = zip(self._results(again), self.wrong, self.scales, strict=True)
        return torch.cat([((a - b) / scale).ravel() for a, b, scale in rows])

    def _candidates(self, places: Places) -> list[tuple[str, str]]:
        """The places that explain most by one step down the slope, where errors are linear."""
        every = [value for values in places.values() for value in values]
        before = self._errors()
        slopes = dict(zip(every, self._slopes(every)[1], strict=True))
        found = []
        for place, values in places.items():
            steep = _norm([slopes[value] for value in values])
            if steep > 0:
                size = _norm(values) or sum(value.numel() for value in values) ** 0.5
                kept = [value.detach().clone() for value in values]
                for value in values:
                    value.data.sub_(STEP * size / steep * slopes[value])
                change = self._errors() - before
                _restore(values, kept)
                cosine = torch.nn.functional.cosine_similarity(before, change, dim=0)
                found.append((float(cosine), place))
        return [place for _, place in sorted(found)[:CANDIDATES]]

    def _slopes(self, values: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(share of the squared errors that is left, its gradient by each value)."""
        for value in values:
            value.requires_grad_(True)
        left = self._errors(again=True).square().sum() / len(self.wrong)
        slopes = torch.autograd.grad(left, list(values), allow_unused=True)
        for value in values:
            value.requires_grad_(False)
        pairs = zip(slopes, values, strict=True)
        return left.detach(), [torch.zeros_like(v) if s is None else s for s, v in pairs]

    def _fit(self, values: Sequence[Tensor]) -> float:
        """The share of the squared errors that is left with the best values that were found."""
        kept = [value.detach().clone() for value in values]
        counts = {"max_iter": ROUNDS, "max_eval": ROUNDS + 2}
        optimizer = torch.optim.LBFGS(values, **counts, line_search_fn="strong_wolfe")
        shares = []

        def left() -> Tensor:
            share, slopes = self._slopes(values)
            for value, slope in zip(values, slopes, strict=True):
                value.grad = slope.contiguous()
            shares.append(float(share))
            return share

        optimizer.step(left)
        _restore(values, kept)
        for value in values:
            value.grad = None
        return min(share for share in shares if share == share)


def _given(add: Callable, place: tuple[str, str], _: nn.Module, arguments: tuple) -> Any:
    return (add(arguments[0], place), *arguments[1:]) if arguments else None


def _made(add: Callable, place: tuple[str, str], _: nn.Module, __: tuple, result: Any) -> Any:
    return add(result, place)


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(sum(tensor.detach().square().sum() for tensor in tensors)) ** 0.5


def _restore(values: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    for value, old in zip(values, kept, strict=True):
        value.data.copy_(old)
