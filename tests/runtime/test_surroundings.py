"""Windows whose blocks are given what is around them: bank, exports, certificate and training."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_dit.app import api
from edge_dit.budget.cost import cost_of_plan
from edge_dit.contract import bank as banks
from edge_dit.contract.bank import Bank
from edge_dit.contract.names import COND, FRESH, OUTSIDE, THROUGH
from edge_dit.errors import BadInput
from edge_dit.models.families import FAMILIES as MODULES
from edge_dit.models.families import family_of
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import Plan, model_of, write_plan
from edge_dit.reference.eager import adapted_subgraph
from edge_dit.reference.evidence import examine
from edge_dit.store.tensors import TensorFile
from loops import on_device, write_world

DRAWS = 6
FAMILIES = ["sana", "flux-dev"]
EXPORT = """
targets = ["onnx"]
recompute = true
"""
DEVICE_DOES = """
er.train("bundle", "bank", "run", target="onnx:{}")
"""
MAIN = "from edge_dit.cli import main; main()"
GIVEN = {"window": "true", "surroundings": "true"}


@dataclass(frozen=True)
class Made:
    """Banks of one job: windows that are given what is around, windows alone, whole pictures."""

    folder: Path
    plan: Plan
    alone: Plan
    whole: Plan

    @property
    def plans(self) -> dict[str, Plan]:
        """The plan of each bank, by its folder."""
        return {"bank": self.plan, "alone": self.alone, "whole": self.whole}

    def bank(self, name: str) -> Bank:
        return Bank(self.folder / name, self.plans[name].identity())

    def predicted(self, name: str, number: int) -> np.ndarray:
        """What the fresh sub-graph predicts of a draw, in the window."""
        bank, plan = self.bank(name), self.plans[name]
        subgraph, _ = adapted_subgraph(plan, model_of(plan))
        batch = {key: torch.from_numpy(value) for key, value in bank[number].items()}
        with torch.no_grad():
            found = subgraph.predict(batch).numpy()
        if name != "whole":
            return found
        assert self.plan.window_rule is not None
        window = self.plan.window_rule.window(bank.index.draws[number])
        return window.latents(found) if found.ndim == 4 else window.tokens(found)


Make = Callable[[str], Made]


def names_of(plan: Plan) -> list[str]:
    model = model_of(plan)
    return model.family.block_names(model.config)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    @functools.cache
    def made(name: str) -> Made:
        folder = tmp_path_factory.mktemp(name)
        path = write_world(folder, name, EXPORT, draws=DRAWS, steps=4, lr=0.01, **GIVEN)
        job = read_job(path)
        plan = make_plan(job)
        alone = plan.model_copy(update={"surroundings": False})
        whole = alone.model_copy(update={"window": False, "s_min": plan.s_max})
        built = Made(folder, plan, alone, whole)
        for kind, one in built.plans.items():
            api.precompute(one, api.read_pictures(job, one), folder / kind)
        api.export(plan, folder / "bundle", ["onnx"], job=job)
        return built

    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_a_window_is_predicted_as_in_its_picture(make: Make, name: str) -> None:
    """Bit for bit but for rounding where sums say all; nearer than alone where means say less."""
    made = make(name)
    for number in range(DRAWS):
        whole, given, alone = (made.predicted(n, number) for n in ("whole", "bank", "alone"))
        error, before = (np.abs(found - whole).max() for found in (given, alone))
        assert error < (1e-5 if name == "sana" else 0.7 * before)
        assert before > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_all_else_is_that_of_windows_alone(make: Make, name: str) -> None:
    given, alone = make(name).bank("bank")[0], make(name).bank("alone")[0]
    outside = {key for key in given if key.startswith(COND + OUTSIDE)}
    assert given.keys() - outside == alone.keys()
    for key, value in alone.items():
        np.testing.assert_array_equal(value, given[key], err_msg=key)
    assert {key.split(".", 2)[2] for key in outside} == {
        names_of(make(name).plan)[number] for number in make(name).plan.running
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_a_certificate_passes_and_finds_another_place(
    make: Make, name: str, tmp_path: Path
) -> None:
    made = make(name)
    pictures = api.read_pictures(read_job(made.folder / "job.toml"), made.plan)
    folders = made.folder / "bundle", made.folder / "bank"
    certificate = api.verify(*folders, model=made.plan.model, images=pictures)
    assert certificate.passed, certificate
    assert {"onnx", "onnx (streamed)", "onnx (recompute)"} <= certificate.targets.keys()
    bank, model = made.bank("bank"), model_of(made.plan)
    seen = {row.name for row in examine(made.plan, model, bank, pictures).tensors}
    outside = next(key for key in bank[0] if key.startswith(COND + OUTSIDE))
    assert f"bank.draw 0.{outside}" in seen
    blind = examine(made.plan, model, bank)
    assert all(row.passed for row in blind.tensors)
    # what is around another window
    shutil.copytree(made.folder / "bank", tmp_path / "moved")
    draws: dict[int, dict[str, np.ndarray]] = {number: {} for number in range(DRAWS)}
    for key, value in TensorFile(banks.shard_path(made.folder / "bank", 0)).read().items():
        number, _, tensor = key.partition(".")
        draws[int(number)][tensor] = np.roll(value, 1) if tensor == outside else value
    banks.write_shard(tmp_path / "moved", 0, draws)
    moved = Bank(tmp_path / "moved", made.plan.identity())
    wrong = [r.name for r in examine(made.plan, model, moved, pictures).tensors if not r.passed]
    assert {name.removeprefix("bank.draw ").partition(".")[2] for name in wrong} == {outside}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tail", "targets"),
    [
        (FRESH, ["onnx", "executorch"]),  # ort-training refuses fresh tails
        (THROUGH, ["onnx", "ort-training", "executorch"]),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_target_has_them_and_tails_that_run_too(
    tmp_path: Path, name: str, tail: str, targets: list[str]
) -> None:
    export = f"targets = {json.dumps(targets)}\n"
    path = write_world(tmp_path, name, export, draws=DRAWS, steps=4, lr=0.01, **GIVEN)
    path.write_text(path.read_text().replace("[plan]", f'[plan]\ntail = "{tail}"'))
    job = read_job(path)
    plan = make_plan(job)
    assert plan.tail == tail
    pictures = api.read_pictures(job, plan)
    api.precompute(plan, pictures, tmp_path / "bank")
    bank = Bank(tmp_path / "bank", plan.identity())
    last = names_of(plan)[-1]
    assert any(key.startswith(COND + OUTSIDE) and key.endswith(last) for key in bank[0])
    api.export(plan, tmp_path / "bundle", plan.targets, job=job)
    certificate = api.verify(
        tmp_path / "bundle", tmp_path / "bank", model=plan.model, images=pictures
    )
    assert certificate.passed, certificate
    assert {*targets} <= certificate.targets.keys()


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["int8", "float32"])
@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_matrices_in_int8_change_nothing_of_it(
    make: Make, name: str, compute: str, tmp_path: Path
) -> None:
    made = make(name)
    job = made.folder / "job.toml"
    text = job.read_text().replace("recompute = true", f'weights = "int8"\ncompute = "{compute}"')
    (made.folder / f"{compute}.toml").write_text(text)
    job = read_job(made.folder / f"{compute}.toml")
    api.export(make_plan(job), tmp_path / "bundle", ["onnx"], job=job)
    certificate = api.verify(tmp_path / "bundle", made.folder / "bank", model=made.plan.model)
    assert certificate.passed, certificate


@pytest.mark.parametrize("layout", [pytest.param("fused", marks=pytest.mark.slow), "streamed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_device_trains_on_them(make: Make, name: str, layout: str) -> None:
    made = make(name)
    shutil.rmtree(made.folder / "run", ignore_errors=True)
    on_device(made.folder, DEVICE_DOES.format(layout))
    losses = np.loadtxt(made.folder / "run" / "loss.csv", delimiter=",", skiprows=1)
    assert losses.shape[0] == 4
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_planner_knows_what_a_draw_takes(make: Make, name: str) -> None:
    made = make(name)
    for folder, plan in (("bank", made.plan), ("alone", made.alone)):
        draw, once = made.bank(folder)[0], plan.per_prompt(family_of(plan.family))
        stored = sum(v.nbytes for k, v in draw.items() if k.removeprefix(COND) not in once)
        assert cost_of_plan(plan)["this plan"].bank_bytes == stored


@pytest.mark.parametrize("name", FAMILIES)
def test_a_float16_bank_has_the_large_ones_in_float16(
    make: Make, name: str, tmp_path: Path
) -> None:
    made = make(name)
    plan = made.plan.model_copy(update={"bank_dtype": "float16"})
    pictures = api.read_pictures(read_job(made.folder / "job.toml"), plan)
    api.precompute(plan, pictures, tmp_path / "bank")
    stored = TensorFile(banks.shard_path(tmp_path / "bank", 0)).read()
    outside = {k: v for k, v in stored.items() if k.partition(".")[2].startswith(COND + OUTSIDE)}
    kinds = {k.partition(OUTSIDE)[2].partition(".")[0]: v.dtype.name for k, v in outside.items()}
    assert kinds == (
        {"sums": "float32", "edge": "float16"}
        if name == "sana"
        else {"keys": "float16", "values": "float16", "mask": "float32"}
    )
    seen = examine(plan, model_of(plan), Bank(tmp_path / "bank", plan.identity()), pictures)
    assert all(row.passed for row in seen.tensors)


def test_the_documents_recipe_is_a_job(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    (recipe,) = (r for r in re.findall(r"```toml\n(.*?)```", text, re.S) if "surroundings" in r)
    asked = tomllib.loads(recipe)
    path = write_world(tmp_path, "sana", 'targets = ["onnx"]\n', steps=4 * 8)
    job = tomllib.loads(path.read_text())
    lines = []
    for section in job.keys() | asked.keys():
        values = {**job.get(section, {}), **asked.get(section, {})}
        lines += [f"[{section}]", *(f"{key} = {json.dumps(v)}" for key, v in values.items())]
    path.write_text("\n".join(lines))
    plan = make_plan(read_job(path))
    assert (plan.window, plan.surroundings, plan.tail) == (True, True, FRESH)
    assert (plan.accumulate, plan.weights, plan.compute) == (8, "int8", "int8")


# ---------------------------------------------------------------- jobs that cannot have them


def test_of_crops_and_of_other_families_they_are_refused(tmp_path: Path) -> None:
    path = write_world(tmp_path, "sd3.5-medium", EXPORT, surroundings="true")
    with pytest.raises(BadInput) as caught:
        make_plan(read_job(path))
    faults = str(caught.value)
    assert "sana or flux" in faults
    assert "surroundings of crops" in faults


def test_a_device_makes_no_bank_with_them_yet(tmp_path: Path) -> None:
    path = write_world(tmp_path, "sana", EXPORT + "loop = true\n", **GIVEN)
    with pytest.raises(BadInput, match=r"\[train\] surroundings") as caught:
        make_plan(read_job(path))
    assert caught.value.where == "export.loop"


def test_nor_does_a_bundle_that_is_exported_with_the_loops_parts(
    make: Make, tmp_path: Path
) -> None:
    made = make("sana")
    write_plan(made.plan, tmp_path / "plan.json")
    asked = ["export", made.folder / "job.toml", "--plan", tmp_path / "plan.json", "--loop"]
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *map(str, asked), "-o", str(tmp_path / "bundle")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "the loop's parts with [train] surroundings" in done.stderr
    assert not (tmp_path / "bundle").exists()


def test_the_families_that_can_are_named() -> None:
    able = {name for name in MODULES if family_of(name).surroundings is not None}
    assert able == {"sana", "flux"}


def test_plans_of_before_keep_their_identity(make: Make) -> None:
    made = make("sana")
    dump = {k: v for k, v in made.alone.model_dump().items() if k != "surroundings"}
    assert Plan.model_validate(dump).identity() == made.alone.identity()
    assert made.plan.identity() != made.alone.identity()
