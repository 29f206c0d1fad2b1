"""Run folders: what must come out the same of two, and folders with a log but without training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_dit_runtime.page.run_page import PAGE, run_page
from edge_dit_runtime.run_folder import Run, RunFolder
from edge_dit_runtime.step_log import STEPS, Step, StepLog

RUN = Run("bundle", "bank", "onnx", "streamed", "m", "b", "sana", "tiny", 4, 8.0, steps=60)
PLAN = {"seed": 3, "optimizer": {"lr": 0.01, "betas": [0.9, 0.999]}, "lora_targets": ["to_q"]}
SKIPPED = (7, 8, 30)


def timeless(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a run, by name, without what tells times: steps.csv without its last column; no
    page and no events.
    """
    kept = {
        name: data
        for name, data in files.items()
        if Path(name).name != PAGE and not Path(name).name.startswith("events.out.tfevents.")
    }
    for name in kept.keys() & {STEPS}:
        head, *rows = kept[name].decode().splitlines()
        assert head.rpartition(",")[2] == "seconds"
        kept[name] = "\n".join(row.rpartition(",")[0] for row in [head, *rows]).encode()
    return kept


def made_log(steps: int, seed: int = 0, lr: float = 0.01) -> StepLog:
    """A log of falling losses, with `SKIPPED` steps."""
    rng, log = np.random.default_rng(seed), StepLog()
    for step in range(steps):
        sigma, loss = rng.uniform(0.01, 1), 2 * np.exp(-step / 40) + rng.uniform(0, 0.2)
        norm = np.inf if step in SKIPPED else rng.uniform(0.1, 1)
        loss = np.nan if step in SKIPPED else loss
        log.add(Step(step % 5, sigma, loss, lr, norm, 0.25))
    return log


def write_run(folder: Path, log: StepLog, run: Run = RUN, plan: dict[str, object] = PLAN) -> Path:
    """A run folder as training leaves it when it was stopped, but for its checkpoint."""
    folder.mkdir()
    RunFolder(folder).begin(run, plan)
    log.write_steps(folder)
    log.write_losses(folder)
    (folder / PAGE).write_text(run_page(folder, run, log, trains=False))
    return folder
