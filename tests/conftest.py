"""A small pipeline on disk and the whole road over it, made once for all tests."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import tiny
from edge_dit.cli import main
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import Plan

SAMPLES = Path(__file__).resolve().parent.parent / "samples"


@dataclass(frozen=True)
class Road:
    """What the stages wrote for the small pipeline."""

    folder: Path
    job: Path
    plan: Plan
    bank: Path
    bundle: Path


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with job.toml, three images and a SANA pipeline: tiny-sana's autoencoder, text
    encoder and scheduler around a random transformer of four blocks.
    """
    folder = tmp_path_factory.mktemp("road")
    parts = shutil.ignore_patterns("transformer")
    shutil.copytree(SAMPLES / "tiny-sana", folder / "model", ignore=parts)
    tiny.transformer(in_channels=8, caption_channels=96).save_pretrained(
        folder / "model" / "transformer"
    )
    (folder / "images").mkdir()
    for source in sorted((SAMPLES / "subject" / "train").glob("*.png"))[:3]:
        shutil.copy(source, folder / "images")
    shutil.copy(SAMPLES / "subject" / "train" / "toy-0.txt", folder / "images")
    (folder / "job.toml").write_text(tiny.JOB)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--target", help="the only target of `road`, where others are not installed")


@pytest.fixture(scope="session")
def road(workplace: Path, request: pytest.FixtureRequest) -> Road:
    """The workplace with plan, bank and a bundle of all targets."""
    from edge_dit.pictures.dataset import read_folder
    from edge_dit.reference.precompute import precompute
    from edge_dit_export.export import export

    job = read_job(workplace / "job.toml")
    plan = make_plan(job)
    (workplace / "plan.json").write_text(plan.model_dump_json())
    images = read_folder(job.data.images, job.data.prompt, plan.s_max)
    precompute(plan, images, workplace / "bank")
    only = request.config.getoption("--target")
    export(plan, workplace / "bundle", [only] if only else plan.targets)
    return Road(workplace, workplace / "job.toml", plan, workplace / "bank", workplace / "bundle")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command line; (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edge-dit", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call
