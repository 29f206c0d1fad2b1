"""A job whose bundle has the loop's parts, and a device: a process that has no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import pipelines
import tiny
from edge_dit.app.run import HIDDEN

EXPORT = f"""
targets = ["onnx"]
loop = true
prompts = [{json.dumps(pipelines.LONG)}]
"""
DEVICE = f"""
import sys
sys.modules.update(dict.fromkeys({HIDDEN!r}))
import edge_dit_runtime as er
"""


def write_world(folder: Path, name: str, export_keys: str = EXPORT, **train: object) -> Path:
    """A pipeline, two pictures and a job; the job's path."""
    pipelines.write_pipeline(name, folder / "model")
    (folder / "images").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 70, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    sizes = {"resolution": 64, "patch": 32, "rank": 2, "alpha": 3, "seed": 3, **train}
    (folder / "job.toml").write_text(tiny.job(pipelines.SHORT, export_keys, **sizes))
    return folder / "job.toml"


def on_device(folder: Path, code: str) -> str:
    """Run code where torch cannot be imported, in a folder; what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", DEVICE + code], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
