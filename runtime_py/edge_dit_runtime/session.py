"""Opens a bundle: each target has a module of its own in `edge_dit_runtime.sessions`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from edge_dit.contract.bundle import Bundle
from edge_dit.contract.targets import TARGETS
from edge_dit_runtime.sessions.trainer import Session


def open_session(bundle: Bundle, target: str, layout: str | None = None) -> Session:
    """Load a target's train step and optimizer.

    Args:
        bundle: opened.
        target: one of its targets.
        layout: one of `Bundle.layouts`; default the first.

    Raises:
        BadInput: the bundle lacks the target or layout, or the target's runtime is not installed.
    """
    chosen = bundle.layout(target, layout)
    return _module(target).open_session(bundle, chosen)


def open_sampler(bundle: Bundle, target: str) -> Callable[..., np.ndarray]:
    """Load a target's patch sampler: image [1, 3, H, W], sigma [1] and uv [2] -> patch
    [1, 3, s_min, s_min], all float32.

    Raises:
        BadInput: see `open_session`.
    """
    bundle.facts(target)
    return _module(target).open_sampler(bundle)


def _module(target: str) -> Any:
    return import_module(f"edge_dit_runtime.sessions.{TARGETS[target].module}")
