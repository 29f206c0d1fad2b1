"""Runs our device code on this machine and on an emulated 64-bit Arm, and compares the runs."""

from __future__ import annotations

import csv
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from edge_dit.contract.adapter import read_adapter

LOSSES = 1e-5
"""Largest relative difference of a loss between two machines."""
ADAPTER = 1e-3
"""Largest difference of a trained value between two machines, of its tensor's largest value.

Where a gradient is within rounding of zero, AdamW's first steps go one way or the other.
"""
MACHINES = ("arm", "x86")
ROOT = Path(__file__).resolve().parents[2]
CODE = (ROOT, ROOT / "export", ROOT / "runtime_py")


@dataclass(frozen=True)
class Machine:
    """A Python with onnxruntime and what edge-dit needs on a device.

    Attributes:
        python: the interpreter.
        packages: what goes to the front of PYTHONPATH.
        hidden: modules that it must not import; a device has neither of them.
    """

    python: Path
    packages: tuple[Path, ...] = ()
    hidden: tuple[str, ...] = ("torch", "matplotlib")

    def run(self, code: str, folder: Path, **environment: str) -> str:
        """What a program prints, run in a folder."""
        hidden = f"import sys; sys.modules.update(dict.fromkeys({self.hidden}))\n"
        paths = map(str, (*self.packages, *CODE))
        done = subprocess.run(
            [self.python, "-c", hidden + code],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-4000:]}"
        return done.stdout


@dataclass(frozen=True)
class Trained:
    """Losses of a run's steps, and the tensors of its adapter."""

    losses: list[float]
    adapter: dict[str, np.ndarray]

    @property
    def bits(self) -> tuple[list[float], dict[str, bytes]]:
        return self.losses, {name: value.tobytes() for name, value in self.adapter.items()}


def trained(run: Path) -> Trained:
    """Read a run that is done."""
    with (run / "loss.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    return Trained(losses, read_adapter(run / "adapter.safetensors")[0])


def assert_agree(found: Trained, wanted: Trained) -> None:
    """Losses and adapters of two runs differ by rounding alone."""
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=LOSSES)
    assert found.adapter.keys() == wanted.adapter.keys()
    for name, value in wanted.adapter.items():
        worst = float(np.abs(found.adapter[name] - value).max())
        largest = float(np.abs(value).max())
        assert worst <= ADAPTER * largest, f"{name}: {worst / largest:.1e} of its largest value"


def assert_same_picture(found: Path, wanted: Path) -> None:
    """No value of two pictures differs by more than one."""
    pixels = [np.asarray(Image.open(path)).astype(int) for path in (found, wanted)]
    assert pixels[1].std() > 5
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


def differ(found: Trained, wanted: Trained) -> bool:
    """Whether `assert_agree` fails."""
    try:
        assert_agree(found, wanted)
    except AssertionError:
        return True
    return False
