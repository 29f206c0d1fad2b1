"""Training on 64-bit Arm, emulated, with the stock onnxruntime: what x86 computes, and runs that go
from one to the other.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from machines import MACHINES, Trained, assert_agree, assert_same_picture, differ, trained

from edge_dit.contract.bank import Bank

pytestmark = pytest.mark.devices

BUNDLES = ("bundle", "int8")
LAYOUTS = ("fused", "streamed")
STEPS = 6
HALF = 3
RELATIVE = 1e-4
"""Largest difference of a draw that a device makes, of its tensor's largest value."""
TRAIN = f"""
import edge_dit_runtime as er

for bundle in {BUNDLES}:
    for layout in {LAYOUTS}:
        for name, steps in (("whole", {STEPS}), ("half", {HALF})):
            er.train(
                bundle, "bank", f"{{bundle}}-{{layout}}-{{name}}", target="onnx:" + layout,
                steps={STEPS}, on_step=lambda done, _: done == steps,
            )
"""
RESUME = f"""
import edge_dit_runtime as er

for bundle in {BUNDLES}:
    for layout in {LAYOUTS}:
        er.train(bundle, "bank", f"{{bundle}}-{{layout}}-half", resume=True)
"""


@pytest.fixture(scope="module")
def runs(machines, made, tmp_path_factory) -> Path:
    """arm/ and x86/, each with the runs of `TRAIN`; from-arm/ and from-x86/, the halves of one gone
    on with on the other.
    """
    folder = tmp_path_factory.mktemp("runs")
    for name, machine in machines.items():
        shutil.copytree(made, folder / name)
        machine.run(TRAIN, folder / name)
    for name, other in (("arm", "x86"), ("x86", "arm")):
        shutil.copytree(folder / name, folder / f"from-{name}")
        machines[other].run(RESUME, folder / f"from-{name}")
    return folder


@pytest.fixture(scope="module")
def run(runs):
    """Reads one of the runs."""

    def read(machine: str, bundle: str, layout: str, name: str = "whole") -> Trained:
        return trained(runs / machine / f"{bundle}-{layout}-{name}")

    return read


def test_both_have_the_same_onnxruntime(machines, tmp_path):
    code = "import platform, onnxruntime as o; print(platform.machine(), o.__version__)"
    said = [machines[name].run(code, tmp_path).split() for name in MACHINES]
    assert [machine for machine, _ in said] == ["aarch64", "x86_64"]
    assert said[0][1] == said[1][1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bundle", BUNDLES)
def test_arm_computes_what_x86_computes(run, bundle, layout):
    arm, x86 = run("arm", bundle, layout), run("x86", bundle, layout)
    assert len(arm.losses) == STEPS
    assert_agree(arm, x86)


def test_another_bundle_is_told_apart(run):
    """So the test above can fail: weights of 8 bits are not those of 32."""
    assert differ(run("arm", "int8", "fused"), run("x86", "bundle", "fused"))


@pytest.mark.parametrize("bundle", BUNDLES)
def test_layouts_agree_on_arm_as_they_do_on_x86(run, bundle):
    fused, streamed = ({m: run(m, bundle, layout) for m in MACHINES} for layout in LAYOUTS)
    for machine in MACHINES:
        assert_agree(streamed[machine], fused[machine])
    assert fused["arm"].bits == streamed["arm"].bits or fused["x86"].bits != streamed["x86"].bits


@pytest.mark.parametrize("begun", MACHINES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_run_goes_on_on_the_other_machine(run, bundle, layout, begun):
    resumed = run(f"from-{begun}", bundle, layout, "half")
    whole = run(begun, bundle, layout)
    assert resumed.losses[:HALF] == whole.losses[:HALF]
    assert_agree(resumed, whole)


def test_arm_makes_the_draws_of_x86(looped):
    arm, x86 = (Bank(looped / name / "bank") for name in MACHINES)
    assert arm.identity == x86.identity
    for wanted, found in zip(x86, arm, strict=True):
        assert wanted.keys() == found.keys()
        for key, value in wanted.items():
            assert np.abs(found[key] - value).max() <= RELATIVE * np.abs(value).max(), key


def test_arm_trains_from_pictures_and_paints(looped):
    assert_agree(*(trained(looped / name / "live") for name in MACHINES))
    assert_same_picture(*(looped / name / "painted.png" for name in MACHINES))
