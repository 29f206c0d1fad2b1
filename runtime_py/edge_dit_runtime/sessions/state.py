"""Checks of draws, adapters and states, shared by the sessions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edge_dit.contract.bundle import Manifest
from edge_dit.contract.names import STEP
from edge_dit.errors import BadInput

REMEDY = "use the files of a run with this bundle"


def check_draw(draw: Mapping[str, np.ndarray], manifest: Manifest, which: str) -> None:
    """Raise `BadInput` unless a draw has every batch tensor of the bundle, in its shape.

    Args:
        draw: as read from a bank.
        manifest: of the bundle.
        which: the draw, for the message.
    """
    for spec in manifest.tensors:
        if spec.role == "batch" and (spec.name not in draw or draw[spec.name].shape != spec.shape):
            there = f"shape {draw[spec.name].shape}" if spec.name in draw else "missing"
            raise BadInput(
                f"{which}, {spec.name}",
                found=there,
                expected=f"shape {spec.shape}, as the bundle takes it",
                remedy="precompute the bank again with the bundle's plan",
            )


def take(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[int]], prefix: str = ""
) -> dict[str, np.ndarray]:
    """Float32 copies of ``tensors[prefix + name]`` for every name, by name.

    Raises:
        BadInput: tensors are missing, or have another shape than the bundle's.
    """
    missing = [name for name in shapes if prefix + name not in tensors]
    if missing:
        raise BadInput(
            f"{prefix}{missing[0]}",
            found=f"missing, with {len(missing) - 1} others",
            expected="every LoRA tensor of the bundle",
            remedy=REMEDY,
        )
    taken = {}
    for name, shape in shapes.items():
        value = np.array(tensors[prefix + name], dtype=np.float32, order="C")
        if value.shape != tuple(shape):
            raise BadInput(
                prefix + name,
                found=f"shape {value.shape}",
                expected=f"shape {tuple(shape)}",
                remedy=REMEDY,
            )
        taken[name] = value
    return taken


def take_step(state: Mapping[str, np.ndarray], name: str = STEP) -> int:
    """Number of updates done, from a `Session.state_dict`; or another number by its name.

    Raises:
        BadInput: there is no such number.
    """
    if name not in state or state[name].size != 1:
        raise BadInput(name, found="not one number", expected="a session's state", remedy=REMEDY)
    return int(state[name].reshape(-1)[0])
