"""A small bank and bundles for tests of other devices; stock builds of onnxruntime; machines."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from machines import Machine

import pipelines
from edge_dit.pictures.dataset import read_folder
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from loops import write_world


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


@pytest.fixture(scope="session")
def arm_root() -> Path:
    """Folder of a userland of 64-bit Arm, with programs `run` and `python`."""
    root = os.environ.get("EDGE_DIT_ARM_ROOT")
    assert root, "`bash .ci/arm-root FOLDER` makes it; then set EDGE_DIT_ARM_ROOT to FOLDER"
    return Path(root)


@pytest.fixture(scope="session")
def arm(arm_root: Path) -> Machine:
    """64-bit Arm, emulated."""
    return Machine(arm_root / "python")


@pytest.fixture(scope="session")
def x86(arm: Machine, stock, tmp_path_factory) -> Machine:
    """The machine at hand, with the stock onnxruntime of the version that ``arm`` has."""
    say = "import onnxruntime; print(onnxruntime.__version__)"
    version = arm.run(say, tmp_path_factory.mktemp("version")).strip()
    return Machine(Path(sys.executable), (stock(version),))


@pytest.fixture(scope="session")
def machines(arm: Machine, x86: Machine) -> dict[str, Machine]:
    return {"arm": arm, "x86": x86}


LOOP = f"""
import edge_dit_runtime as er

er.collect("bundle", "images", "bank")
er.train("bundle", er.live("bundle", "images"), "live", target="onnx:streamed", steps=4)
er.paint("bundle", {pipelines.LONG.strip()!r}, "painted.png", run="live", seeds=5)
"""


@pytest.fixture(scope="session")
def looped(machines: dict[str, Machine], tmp_path_factory) -> Path:
    """arm/ and x86/: a bundle with the loop's parts, and what each made of the same pictures."""
    from edge_dit.app.api import export

    folder = tmp_path_factory.mktemp("loop")
    job = read_job(write_world(folder, "sana", draws=2, steps=4, lr=0.01))
    export(make_plan(job), folder / "bundle", ["onnx"], job=job)
    for name, machine in machines.items():
        (folder / name).mkdir()
        for inputs in ("bundle", "images"):
            (folder / name / inputs).symlink_to(folder / inputs)
        machine.run(LOOP, folder / name)
    return folder
