"""A small bank and bundle for tests on other devices, and stock builds of onnxruntime."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from edge_dit.pictures.dataset import read_folder
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan


@pytest.fixture(scope="session")
def made(workplace: Path, tmp_path_factory) -> Path:
    """A folder with bank/, bundle/ and int8/, a bundle that multiplies in int8; not to be
    changed.
    """
    from edge_dit.reference.precompute import precompute
    from edge_dit_export.export import export

    folder = tmp_path_factory.mktemp("made")
    job = read_job(workplace / "job.toml")
    plan = make_plan(job).model_copy(update={"targets": ["onnx"], "draws": 6, "steps": 6})
    precompute(plan, read_folder(job.data.images, job.data.prompt, plan.s_max), folder / "bank")
    export(plan, folder / "bundle", ["onnx"])
    int8 = plan.model_copy(update={"weights": "int8", "compute": "int8"})
    export(int8, folder / "int8", ["onnx"])
    return folder


@pytest.fixture(scope="session")
def stock(tmp_path_factory) -> Callable[[str], Path]:
    """Installs a stock onnxruntime, by its version or "" for the newest, into a folder that goes to
    the front of PYTHONPATH: this environment may have the training build of 1.19.2.
    """

    @cache
    def install(version: str = "") -> Path:
        folder = tmp_path_factory.mktemp("stock")
        wanted = f"onnxruntime=={version}" if version else "onnxruntime"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
        subprocess.run([*pip, wanted], check=True)
        return folder

    return install
