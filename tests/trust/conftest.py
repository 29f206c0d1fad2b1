"""A bank and an onnx bundle that do not take long to make, and copies of them to break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge_dit.pictures.dataset import read_folder
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import Plan


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """The user's cache of hashes is left alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def plan(workplace: Path) -> Plan:
    job = read_job(workplace / "job.toml")
    return make_plan(job).model_copy(update={"targets": ["onnx"], "draws": 6, "steps": 8})


@pytest.fixture(scope="session")
def made(workplace: Path, plan: Plan, tmp_path_factory) -> Path:
    """A folder with bank/ and bundle/, not to be changed."""
    from edge_dit.reference.precompute import precompute
    from edge_dit_export.export import export

    folder = tmp_path_factory.mktemp("made")
    (folder / "plan.json").write_text(plan.model_dump_json())
    job = read_job(workplace / "job.toml")
    precompute(plan, read_folder(job.data.images, job.data.prompt, plan.s_max), folder / "bank")
    export(plan, folder / "bundle", plan.targets)
    return folder


@pytest.fixture
def bank(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "bank", tmp_path / "bank"))


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "bundle", tmp_path / "bundle"))
