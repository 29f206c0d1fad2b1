"""Patches that are windows of whole pictures' states: host, device, certificate and training."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_dit.app import api
from edge_dit.contract import bank as banks
from edge_dit.contract.bank import Bank
from edge_dit.errors import BadInput
from edge_dit.models.families import FAMILIES as MODULES
from edge_dit.models.families import family_of
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import Plan, model_of
from edge_dit.reference.evidence import examine
from edge_dit.store.tensors import TensorFile
from loops import on_device, write_world

DRAWS = 6
FAMILIES = [
    "sana",
    "flux-dev",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd3.5-medium", "pixart-sigma")),
]
RELATIVE = 1e-4
"""Of a tensor's largest value: the limit for a bank of the device."""
DEVICE_DOES = """
er.collect("bundle", "images", "device")
er.train("bundle", "device", "run", target="onnx:streamed")
er.train("bundle", er.live("bundle", "images"), "live", target="onnx:streamed")
"""


@dataclass(frozen=True)
class Made:
    """A host's bank and bundle of windows; and a bank of whole pictures."""

    folder: Path
    plan: Plan
    whole: Plan


Make = Callable[[str], Made]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    @functools.cache
    def made(name: str) -> Made:
        folder = tmp_path_factory.mktemp(name)
        path = write_world(folder, name, draws=DRAWS, steps=4, lr=0.01, window="true")
        mask = np.zeros((64, 70), np.uint8)
        mask[:, :40] = 255
        Image.fromarray(mask).save(folder / "images" / "0.mask.png")
        job = read_job(path)
        plan = make_plan(job)
        whole = plan.model_copy(update={"window": False, "s_min": plan.s_max})
        pictures = api.read_pictures(job, plan)
        api.precompute(plan, pictures, folder / "host")
        api.precompute(whole, pictures, folder / "whole")
        api.export(plan, folder / "bundle", ["onnx"], job=job)
        on_device(folder, DEVICE_DOES)
        return Made(folder, plan, whole)

    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_a_window_is_part_of_the_whole_pictures_states(make: Make, name: str) -> None:
    made = make(name)
    windows = Bank(made.folder / "host", made.plan.identity())
    whole = Bank(made.folder / "whole", made.whole.identity())
    rule, placed = made.plan.window_rule, made.plan.placed(family_of(made.plan.family))
    assert rule is not None
    corners = set()
    for number, draw in enumerate(windows.index.draws):
        assert draw == whole.index.draws[number]
        window, stored = rule.window(draw), windows[number]
        wanted = window.cut(whole[number], placed)
        assert wanted.keys() == stored.keys()
        for key, value in wanted.items():
            np.testing.assert_array_equal(value, stored[key], err_msg=key)
        assert stored["entry"].shape[1] < whole[number]["entry"].shape[1]
        corners.add((window.place.top, window.place.left))
    assert len(corners) > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_bank_of_the_device_is_that_of_the_host(make: Make, name: str) -> None:
    made = make(name)
    host, device = (Bank(made.folder / where, made.plan.identity()) for where in ("host", "device"))
    assert host.identity == device.identity
    for number in range(DRAWS):
        wanted, found = host[number], device[number]
        assert wanted.keys() == found.keys()
        for key, value in wanted.items():
            error = np.abs(value - found[key]).max()
            assert error <= RELATIVE * np.abs(value).max(), f"{key} of draw {number}"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_certificate_passes_and_finds_another_place(
    make: Make, name: str, tmp_path: Path
) -> None:
    made = make(name)
    job = read_job(made.folder / "job.toml")
    pictures = api.read_pictures(job, made.plan)
    certificate = api.verify(
        made.folder / "bundle", made.folder / "host", model=made.plan.model, images=pictures
    )
    assert certificate.passed, certificate
    bank = Bank(made.folder / "host", made.plan.identity())
    model = model_of(made.plan)
    seen = examine(made.plan, model, bank, pictures)
    assert all(row.passed for row in seen.tensors)
    assert {f"bank.draw 0.{n}" for n in ("entry", "target")} <= {row.name for row in seen.tensors}
    blind = examine(made.plan, model, bank)
    assert all(row.passed for row in blind.tensors)
    assert any("windows" in line for line in blind.out_of_reach)
    # windows of the right pictures at another place: the same states, a token further
    shutil.copytree(made.folder / "host", tmp_path / "moved")
    draws: dict[int, dict[str, np.ndarray]] = {number: {} for number in range(DRAWS)}
    for key, value in TensorFile(banks.shard_path(made.folder / "host", 0)).read().items():
        number, _, tensor = key.partition(".")
        draws[int(number)][tensor] = np.roll(value, 1, axis=1) if tensor == "entry" else value
    banks.write_shard(tmp_path / "moved", 0, draws)
    found = examine(made.plan, model, Bank(tmp_path / "moved", made.plan.identity()), pictures)
    wrong = [row.name for row in found.tensors if not row.passed]
    assert "bank.draw 0.entry" in wrong
    assert "bank.draw 0.target" not in wrong


@pytest.mark.parametrize("name", FAMILIES)
def test_training_on_windows_learns(make: Make, name: str) -> None:
    made = make(name)
    for run in ("run", "live"):
        losses = np.loadtxt(made.folder / run / "loss.csv", delimiter=",", skiprows=1)
        assert losses.shape[0] == 4
        assert np.isfinite(losses).all()


def test_families_whose_positions_cannot_be_cut_refuse(tmp_path: Path) -> None:
    path = write_world(tmp_path, "qwen-image", window="true")
    with pytest.raises(BadInput, match="sana, flux") as caught:
        make_plan(read_job(path))
    assert caught.value.where == "train.window"


def test_the_families_that_can_are_named() -> None:
    able = {name for name in MODULES if family_of(name).placed is not None}
    assert able == {"sana", "flux", "sd3", "pixart"}


def test_plans_of_before_keep_their_identity(make: Make) -> None:
    plan = make("sana").plan
    crops = plan.model_copy(update={"window": False})
    without = Plan.model_validate({k: v for k, v in crops.model_dump().items() if k != "window"})
    assert without.identity() == crops.identity()
    assert plan.identity() != crops.identity()
