"""Opens a target of a bundle, with the target's module in `edge_dit_runtime.sessions`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from edge_dit.contract.bundle import Bundle, open_bundle
from edge_dit.contract.integrity import check_bundle
from edge_dit.contract.targets import STREAMED, TARGETS
from edge_dit.errors import BadInput
from edge_dit.store.files import StrPath
from edge_dit_runtime.room import held, room
from edge_dit_runtime.sessions.trainer import Session


def open_session(bundle: Bundle, target: str, layout: str | None = None) -> Session:
    """Load a target's train step and optimizer.

    Args:
        bundle: opened.
        target: one of its targets.
        layout: one of the target's layouts; default the first.

    Raises:
        BadInput: the bundle lacks the target or layout, or the target's runtime is not installed.
    """
    chosen = bundle.layout(target, layout)
    return _module(target).open_session(bundle, chosen)


def check_room(bundle: Bundle, target: str, layout: str) -> None:
    """Refuse a layout that is predicted to take more memory than is free. The streamed layout is
    never refused, and nothing is where the bundle or the system does not say.

    Raises:
        BadInput: too little memory is free.
    """
    facts, free = bundle.facts(target), room()
    if layout == STREAMED or free is None or layout not in facts.memory:
        return
    more = facts.memory[layout] - held()
    if more > free:
        streamed = STREAMED in facts.layouts()
        other = (
            f"--target {target}:{STREAMED}" if streamed else "a layout or target that takes less"
        )
        raise BadInput(
            bundle.folder,
            found=f"{free / 1e6:,.0f} MB of memory free",
            expected=f"about {more / 1e6:,.0f} MB for {bundle.titled(target, layout)}",
            remedy=f"take {other}, or try all the same with --any-memory (any_memory=True)",
        )


def open(bundle: StrPath, target: str | None = None) -> Session:
    """Open a bundle to step it yourself; its files are checked first.

    Args:
        bundle: folder of the bundle.
        target: "onnx", or with a layout "onnx:streamed"; default the bundle's first target.

    Raises:
        BadInput: the bundle is damaged, lacks the target or layout, or the target's runtime is not
            installed.

    Example:
        >>> session = er.open("bundle")
        >>> loss = session.step(bank[0])
        >>> loss > 0
        True
    """
    opened = open_bundle(Path(bundle))
    name, _, layout = (target or next(iter(opened.manifest.targets), "onnx")).partition(":")
    opened.layout(name, layout or None)
    check_bundle(opened, name)
    return open_session(opened, name, layout or None)


def open_sampler(bundle: Bundle, target: str) -> Callable[..., np.ndarray]:
    """Load a target's patch sampler: image [1, 3, H, W], sigma [1] and uv [2] -> patch
    [1, 3, s_min, s_min], all float32.

    Raises:
        BadInput: the bundle lacks the target, or the target's runtime is not installed.
    """
    bundle.facts(target)
    return _module(target).open_sampler(bundle)


def _module(target: str) -> Any:
    return import_module(f"edge_dit_runtime.sessions.{TARGETS[target].module}")
