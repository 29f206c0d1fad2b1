"""samples/cpp on 64-bit Arm, emulated: cross-compiled, with the libraries of the stock wheels."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
from machines import MACHINES, ROOT, Machine, assert_agree, assert_same_picture, trained

import pipelines

pytestmark = pytest.mark.devices

STEPS = 6
HALF = 3
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux2014", "manylinux_2_17")
ONNX = [(b, f"onnx:{layout}") for b in ("bundle", "int8") for layout in ("fused", "streamed")]
CASES = [*ONNX, ("road", "executorch")]
"""Bundles and their targets."""


@dataclass(frozen=True)
class Case:
    """What is trained, and by which Python on which machine.

    Attributes:
        arm: None where Arm has no Python for the target: ExecuTorch's needs torch.
    """

    bundle: Path
    bank: Path
    target: str
    x86: Machine
    arm: Machine | None


@pytest.fixture(scope="module")
def executorch(tmp_path_factory) -> Path:
    """Folder with include/ and lib/ of ExecuTorch for Arm, of the release that is installed."""
    folder = tmp_path_factory.mktemp("executorch")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
    pip += ["--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp"]
    pip += [word for name in PLATFORMS for word in ("--platform", f"{name}_aarch64")]
    subprocess.run([*pip, f"executorch=={version('executorch')}"], check=True)
    return folder / "executorch"


@pytest.fixture(scope="module")
def programs(executorch: Path, tmp_path_factory) -> Path:
    """Folder of the programs for Arm."""
    build = tmp_path_factory.mktemp("build")
    settings = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++",
        "CMAKE_EXE_LINKER_FLAGS": "-Wl,--allow-shlib-undefined",
        "EDGE_DIT_EXECUTORCH": executorch,
    }
    defined = [f"-D{name}={value}" for name, value in settings.items()]
    subprocess.run(["cmake", "-S", ROOT / "samples" / "cpp", "-B", build, *defined], check=True)
    subprocess.run(["cmake", "--build", build, "-j", "2"], check=True)
    return build


@pytest.fixture(scope="module")
def run(arm_root: Path, programs: Path) -> Callable[..., None]:
    """Runs a program for Arm, which must succeed."""
    (library,) = (arm_root / "packages" / "onnxruntime" / "capi").glob("libonnxruntime.so.*")

    def call(program: str, *arguments: object) -> None:
        command = [arm_root / "run", programs / program, *arguments, "--onnxruntime", library]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-4000:]}"

    return call


@pytest.fixture(scope="module")
def train(run) -> Callable[..., None]:
    """Trains with the program for Arm."""

    def call(case: Case, folder: Path, steps: int, *more: str) -> None:
        options = ("--bank", case.bank, "-o", folder, "--target", case.target, "--steps", steps)
        run("edge-dit-train", case.bundle, *options, *more)

    return call


@pytest.fixture(params=CASES, ids=" ".join)
def case(request, arm: Machine) -> Case:
    bundle, target = request.param
    if target == "executorch":
        road = request.getfixturevalue("road")
        return Case(road.bundle, road.bank, target, Machine(Path(sys.executable), hidden=()), None)
    made, x86 = (request.getfixturevalue(name) for name in ("made", "x86"))
    return Case(made / bundle, made / "bank", target, x86, arm)


def by_python(machine: Machine, case: Case, run: Path, steps: int = STEPS, **more: object) -> None:
    given = f"{str(case.bundle)!r}, {str(case.bank)!r}, {str(run)!r}"
    code = f"er.train({given}, target={case.target!r}, steps={steps}, **{more})"
    machine.run(f"import edge_dit_runtime as er\n{code}", run.parent)


def test_it_computes_what_python_computes(case: Case, train, tmp_path):
    """Within rounding of x86; to the bit of Python on Arm."""
    train(case, tmp_path / "cpp", STEPS)
    by_python(case.x86, case, tmp_path / "x86")
    found, wanted = trained(tmp_path / "cpp"), trained(tmp_path / "x86")
    assert len(found.losses) == STEPS
    assert_agree(found, wanted)
    if case.arm:
        by_python(case.arm, case, tmp_path / "arm")
        assert found.bits == trained(tmp_path / "arm").bits


@pytest.mark.parametrize("case", [CASES[1], CASES[-1]], ids=" ".join, indirect=True)
def test_a_run_goes_on_on_the_other_machine(case: Case, train, tmp_path):
    """The learning rate follows from the number of steps, so all runs do `HALF`, then the rest."""
    by_python(case.x86, case, tmp_path / "whole", HALF)
    by_python(case.x86, case, tmp_path / "whole", resume=True)
    whole = trained(tmp_path / "whole")
    train(case, tmp_path / "begun", HALF)
    by_python(case.x86, case, tmp_path / "begun", resume=True)
    assert_agree(trained(tmp_path / "begun"), whole)
    by_python(case.x86, case, tmp_path / "ended", HALF)
    train(case, tmp_path / "ended", STEPS, "--resume")
    assert_agree(trained(tmp_path / "ended"), whole)


def test_it_paints_what_python_paints(looped, run, tmp_path):
    painted, live = tmp_path / "painted.png", looped / "arm" / "live"
    options = ("--run", live, "--seed", 5, "-o", painted)
    run("edge-dit-paint", looped / "bundle", pipelines.LONG.strip(), *options)
    for name in MACHINES:
        assert_same_picture(painted, looped / name / "painted.png")
