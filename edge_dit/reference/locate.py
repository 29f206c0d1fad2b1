"""Where a wrong export is most likely wrong: its errors beside those of faults made on purpose.

A fault in one module shows in the gradients of all others: through attention most in its
neighbours', not in its own. So each frozen module of PyTorch's sub-graph is made wrong in turn, by
noise on its weights. How far every gradient then is from the right one makes a profile. The module
whose profile is most like the errors that were measured is where to look first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from edge_dit.contract.certificate import Difference, differences
from edge_dit.models.subgraph import TrainableSubgraph

AMOUNTS = (0.02, 0.3, 2.0)
"""Sizes of the noise, in standard deviations of a weight: large faults saturate."""
ALONE = 0.02
"""If all other gradients have at most this share of the worst error, the fault is in that gradient
alone."""
FLOOR, CEILING = 1e-6, 10.0
"""Errors are compared between these: below is rounding, above any is as wrong."""
ALIKE = 1.0
"""Largest spread of measured errors over a profile's, in powers of e, that says something."""
MOST_SECONDS = 300.0
"""Longest time that is spent on profiles. A model of real size would take hours; nothing is said of
where its fault is but the gradients themselves.
"""
LORA, BASE = ".lora_", ".base_layer"
Tensors = Mapping[str, np.ndarray]
Profiles = Mapping[str, list[Mapping[str, float]]]


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


def profiles(
    subgraph: TrainableSubgraph, compute: Callable[[], Tensors], tolerances: Mapping[str, float]
) -> Profiles:
    """Errors of every gradient by name, for faults in each frozen module by name; none if that
    would take longer than `MOST_SECONDS`.

    Args:
        subgraph: with LoRA in place; the same again afterwards.
        compute: its gradients, by the names of `edge_dit_runtime.measure.measure`.
        tolerances: as `differences` takes them.
    """
    started = time.monotonic()
    right = compute()
    frozen = [(n, p) for n, p in subgraph.named_parameters() if LORA not in n]
    found: dict[str, list[Mapping[str, float]]] = {}
    if len(frozen) * len(AMOUNTS) * (time.monotonic() - started) > MOST_SECONDS:
        return found
    for name, parameter in frozen:
        module = name.replace(BASE, "").rpartition(".")[0]
        for _ in _made_wrong(parameter):
            rows = differences(right, compute(), tolerances)
            found.setdefault(module, []).append({row.name: row.relative for row in rows})
    return found


def _made_wrong(parameter: nn.Parameter) -> Iterator[None]:
    """The parameter wrong in several ways, one after the other, then right."""
    kept = parameter.detach().clone()
    size = kept.std() if kept.numel() > 1 else kept.abs()
    noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(0))
    for amount in AMOUNTS:
        parameter.data.copy_(kept + amount * size * noise)
        yield
    parameter.data.copy_(kept)


def likely_module(rows: Sequence[Difference], known: Profiles) -> str:
    """The module whose faults look most like the measured errors; "" if none does.

    Args:
        rows: every tensor.
        known: from `profiles`.
    """
    errors = {row.name: row.relative for row in rows if row.kind == "gradients"}
    worst = max(errors, key=lambda name: errors[name]).split(LORA)[0]
    others = [error for name, error in errors.items() if not name.startswith(worst + LORA)]
    if not known or max(others, default=0) <= ALONE * max(errors.values()):
        return ""  # the latter is how no fault of the forward pass looks
    names = list(errors)
    have = _logarithms(errors, names)
    spread, module = min(
        (float(np.std(have - _logarithms(profile, names))), module)
        for module, of_module in known.items()
        for profile in of_module
    )
    return module if spread <= ALIKE else ""


def _logarithms(errors: Mapping[str, float], names: Sequence[str]) -> np.ndarray:
    return np.log(np.clip([errors[name] for name in names], FLOOR, CEILING))
