"""A checkpoint that an adapter is used on, where it is not the one that it is trained on.

Distilled checkpoints paint in few steps, and lose that if they are trained. So people train on the
base and use the adapter on the distilled one (docs/recipes.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_dit.errors import BadInput
from edge_dit.models.model import Model, open_model
from edge_dit.models.source import locate
from edge_dit.planning.job import Job

if TYPE_CHECKING:
    import torch

KEY = "model.use_on"


def model_used(job: Job) -> Model | None:
    """The model of a job's `use_on`; None if it has none (imports torch).

    Raises:
        BadInput: it cannot be had, or no family supports it.
    """
    asked = job.model.use_on
    return None if asked is None else open_model(locate(asked).folder)


def use_faults(job: Job, model: Model) -> list[BadInput]:
    """What keeps an adapter from being used where the job says.

    Args:
        job: that may name such a model.
        model: that it trains on.
    """
    try:
        used = model_used(job)
    except BadInput as fault:
        return [fault]
    if used is None:
        return []
    faults = []
    if used.family.name != model.family.name:
        faults.append(
            BadInput(
                KEY,
                found=f"{used.folder.name}, of the family {used.family.name}",
                expected=f"a checkpoint of the family {model.family.name}, that it trains on",
                remedy="name the distilled checkpoint of the same model, or remove use_on",
            )
        )
    elif (differs := _difference(_shapes(model), _shapes(used))) is not None:
        faults.append(
            BadInput(
                KEY,
                found=f"{used.folder.name}, {differs}",
                expected="blocks of the same shapes as those that are trained",
                remedy="name the distilled checkpoint of the same size, or remove use_on",
            )
        )
    if job.export.loop:
        faults.append(
            BadInput(
                KEY,
                found="beside export.loop: the device would paint with what it trains on",
                expected="one of the two",
                remedy="remove loop; `edge-dit run` then paints samples with use_on",
            )
        )
    return faults


def _shapes(model: Model) -> dict[str, torch.Size]:
    """Shapes of the weights of all blocks, by name."""
    blocks = tuple(f"{name}." for name in model.family.block_names(model.config))
    weights = model.meta().named_parameters()
    return {name: weight.shape for name, weight in weights if name.startswith(blocks)}


def _difference(trained: dict[str, torch.Size], used: dict[str, torch.Size]) -> str | None:
    """How the used model's blocks differ from the trained one's, in words; None if they do not."""
    for name in sorted(trained.keys() | used.keys()):
        if name not in used:
            return f"which has no {name}"
        if name not in trained:
            return f"which also has {name}"
        if trained[name] != used[name]:
            return f"whose {name} is {list(used[name])}, not {list(trained[name])}"
    return None
