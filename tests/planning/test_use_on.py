"""A base that is trained on, and a distilled checkpoint that the adapter is used on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pipelines
import tiny
from edge_dit.app.samples import FILE, write_samples
from edge_dit.contract.adapter import write_adapter_folder
from edge_dit.contract.adapter_formats import format_of
from edge_dit.errors import BadInput, CheckFailed, ManyFaults
from edge_dit.models.subgraph import lora_modules
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.use_on import model_used
from edge_dit.reference.contact_sheet import contact_sheet


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """FLUX.2 klein, base and distilled, and pictures."""
    folder = tmp_path_factory.mktemp("use-on")
    pipelines.write_pipeline("flux2-klein", folder / "base")
    pipelines.write_pipeline("flux2-klein-distilled", folder / "distilled")
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (48, 60, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "0.png")
    return folder


def job_of(place: Path, model: str, export: str = "") -> Path:
    text = tiny.job(pipelines.SHORT, export, resolution=32, patch=16)
    path = place / "job.toml"
    path.write_text(text.replace('path = "model"', model))
    return path


BOTH = 'train_on = "base"\nuse_on = "distilled"'


def test_the_base_is_planned_and_the_distilled_one_opened(place):
    job = read_job(job_of(place, BOTH))
    plain = read_job(job_of(place, 'path = "base"'))
    assert make_plan(job) == make_plan(plain)
    used = model_used(job)
    assert used is not None
    assert used.folder == place / "distilled"
    assert model_used(plain) is None


def test_two_names_of_one_key_are_refused(place):
    with pytest.raises(BadInput) as caught:
        read_job(job_of(place, 'path = "base"\n' + BOTH))
    assert caught.value.where == f"{place / 'job.toml'}:4"
    assert "two names of one key" in caught.value.expected


def test_a_missing_base_is_named(place):
    with pytest.raises(BadInput) as caught:
        read_job(job_of(place, 'train_on = "nowhere"\nuse_on = "distilled"'))
    assert "no folder" in caught.value.found


def faults_of(path: Path) -> dict[str, str]:
    with pytest.raises(BadInput) as caught:
        make_plan(read_job(path))
    fault = caught.value
    faults = fault.faults if isinstance(fault, ManyFaults) else [fault]
    return {fault.where: fault.found for fault in faults}


def test_what_an_adapter_does_not_fit_is_refused(place, tmp_path):
    pipelines.write_pipeline("flux-schnell", tmp_path / "other")
    found = faults_of(job_of(place, f'train_on = "base"\nuse_on = "{tmp_path}/other"'))
    assert found["model.use_on"] == "other, of the family flux"

    wider = pipelines.write_pipeline("flux2-klein", tmp_path / "wider")
    config = wider / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "mlp_ratio": 4.0}))
    found = faults_of(job_of(place, f'train_on = "base"\nuse_on = "{wider}"'))
    assert "single_transformer_blocks.0.attn.to_out.weight is [32, 160]" in found["model.use_on"]
    assert "not [32, 128]" in found["model.use_on"]


def test_a_device_that_paints_is_refused(place):
    found = faults_of(job_of(place, BOTH, "loop = true"))
    assert "export.loop" in found["model.use_on"]


def test_samples_are_the_distilled_pipelines_with_every_tensor(place, tmp_path, monkeypatch):
    plan, used = make_plan(read_job(job_of(place, BOTH))), model_used(read_job(job_of(place, BOTH)))
    assert used is not None
    modules = lora_modules(used.family, used.meta(), plan.trained, plan.lora_targets)
    rng, tensors, meta = np.random.default_rng(1), {}, used.meta()
    for module in modules:
        out, inside = meta.get_submodule(module).weight.shape
        for part, shape in (("A", (2, inside)), ("B", (out, 2))):
            values = rng.normal(0, 0.5, shape).astype(np.float32)
            tensors[f"transformer.{module}.lora_{part}.weight"] = values
    form = format_of(plan.family)
    write_adapter_folder(tmp_path / "lora", tensors, 2, 2.0, "base", form)

    calls = []

    def told(family, pipeline, *rest):
        calls.append((pipeline.config.is_distilled, family.sample_options(pipeline, 1)))
        return contact_sheet(family, pipeline, *rest)

    monkeypatch.setattr("edge_dit.reference.contact_sheet.contact_sheet", told)
    made = write_samples(used, tmp_path / "lora", ["a sks toy"], 32, tmp_path)
    assert made == tmp_path / FILE
    with Image.open(made) as picture:
        assert picture.width >= 2 * 32
    [(distilled, options)] = calls
    assert distilled
    assert options["num_inference_steps"] == 4

    half = {name: value for name, value in tensors.items() if "single" not in name}
    strange = {name.replace("attn.to_q", "attn.to_nothing"): v for name, v in half.items()}
    write_adapter_folder(tmp_path / "strange", strange, 2, 2.0, "base", form)
    with pytest.raises(CheckFailed, match="took"):
        write_samples(used, tmp_path / "strange", ["a sks toy"], 32, tmp_path)
