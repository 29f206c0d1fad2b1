"""Trains bundles on the device: numpy and onnxruntime only; ExecuTorch needs torch.

    import edge_dit_runtime as er

    session = er.open("bundle")                     # to step it yourself
    run = er.train("bundle", "bank", "run")         # Ctrl-C stops it; resume=True goes on
    er.save_lora("run", "lora")                     # pipe.load_lora_weights("lora")

    er.collect("bundle", "pictures", "bank")        # of a bundle with the loop's parts
    er.train("bundle", er.live("bundle", "pictures"), "run")
    er.paint("bundle", "a red toy", "toy.png", run="run")

Names are imported when they are first used: importing this package takes no time.

    session      opens a target: a `Session` that steps, and the patch sampler
    loop/        pictures to draws, prompts to pictures
    sessions/    one module per target, and what they share
    training     the loop over a bank: progress, checkpoints, resume
    run_folder   what a run keeps on disk; step_log its losses; loss_plot draws them
    page/        pages about runs, for people
    measure      measures what verify compares, in a process of its own
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Imported before onnxruntime and torch, because it sets how their threads wait.
import edge_dit  # noqa: F401

if TYPE_CHECKING:
    from edge_dit_runtime.loop.collect import collect as collect
    from edge_dit_runtime.loop.live import live as live
    from edge_dit_runtime.loop.paint import paint as paint
    from edge_dit_runtime.run_folder import Run as Run
    from edge_dit_runtime.run_folder import save_lora as save_lora
    from edge_dit_runtime.session import open as open
    from edge_dit_runtime.sessions.trainer import Session as Session
    from edge_dit_runtime.training import Wait as Wait
    from edge_dit_runtime.training import train as train

_HOME = {
    "open": "session",
    "train": "training",
    "collect": "loop.collect",
    "live": "loop.live",
    "paint": "loop.paint",
    "save_lora": "run_folder",
    "Run": "run_folder",
    "Session": "sessions.trainer",
    "Wait": "training",
}
"""Name of the API -> module that has it."""
__all__ = ["Run", "Session", "Wait", "collect", "live", "open", "paint", "save_lora", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
