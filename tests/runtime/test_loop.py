"""The loop on the device: the same draws and pictures as the host, without torch."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import edge_dit_runtime as er
import pipelines
from edge_dit.app import api
from edge_dit.contract.bank import Bank
from edge_dit.contract.bundle import Bundle
from edge_dit.errors import BadInput, ManyFaults
from edge_dit.models.families import family_of
from edge_dit.models.pipeline import load_pipeline
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import Plan
from edge_dit.reference.evaluate import adapted
from edge_dit_runtime.loop.collect import open_parts
from edge_dit_runtime.loop.live import RING, USES, LiveDraws
from edge_dit_runtime.run_folder import RunFolder
from loops import on_device, write_world

DRAWS = 6
STEPS = 4
FAMILIES = [
    "sana",
    "flux-dev",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("sd3.5-medium", "pixart-sigma", "qwen-image")
    ),
]
CHOICES = {"flux-dev": 'trigger = "zwx"\ncaption_dropout = 0.4\ncaption_lines = true\n'}
"""Further keys of [data] for one of the families."""
RELATIVE = 1e-4
"""Of a tensor's largest value: the issue's own limit for a bank of the device."""


@dataclass(frozen=True)
class Made:
    """A host's bank and bundle, and what a device made of the same pictures."""

    folder: Path
    plan: Plan
    bundle: Bundle


Make = Callable[..., Made]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    @functools.cache
    def made(name: str, **plan: object) -> Made:
        folder = tmp_path_factory.mktemp(name)
        sizes = {"draws": DRAWS, "steps": STEPS, "lr": 0.01, "preview_every": 2}
        path = write_world(folder, name, **sizes)
        path.write_text(path.read_text().replace("[data]\n", "[data]\n" + CHOICES.get(name, "")))
        job = read_job(path)
        planned = make_plan(job).model_copy(update=plan)
        api.precompute(planned, api.read_pictures(job, planned), folder / "host")
        bundle = api.export(planned, folder / "bundle", ["onnx"], job=job)
        on_device(folder, DEVICE_DOES)
        return Made(folder, planned, bundle)

    return made


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


DEVICE_DOES = """
er.collect("bundle", "images", "device")
er.train("bundle", "device", "run", target="onnx:streamed")
er.train("bundle", er.live("bundle", "images"), "live", target="onnx:streamed")
"""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_bank_of_the_device_is_that_of_the_host(make, name):
    made = make(name)
    host, device = (Bank(made.folder / where, made.plan.identity()) for where in ("host", "device"))
    assert host.identity == device.identity
    if name in CHOICES:
        drawn = {host.index.prompts[draw.prompt] for draw in host.index.draws}
        assert drawn == {f"zwx, {pipelines.SHORT}", ""}
    files = [sorted(p.name for p in bank.folder.iterdir()) for bank in (host, device)]
    assert files[0] == files[1]
    for number in range(DRAWS):
        wanted, found = host[number], device[number]
        assert wanted.keys() == found.keys()
        for key, value in wanted.items():
            assert value.shape == found[key].shape
            error = np.abs(value - found[key]).max()
            assert error <= RELATIVE * np.abs(value).max(), f"{key} of draw {number}"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_painting_is_that_of_stock_diffusers(make, name, tmp_path):
    """With the adapter of a run, whose B is not zero, and without."""
    made = make(name)
    prompt, seed, side = pipelines.LONG.strip(), 5, made.plan.s_max
    er.save_lora(made.folder / "run", tmp_path / "lora")
    pipeline = load_pipeline(made.folder / "model")
    family = family_of(made.plan.family)
    pictures = []
    for run, lora in ((None, None), (made.folder / "run", tmp_path / "lora")):
        painted = er.paint(made.bundle.folder, prompt, tmp_path / "p.png", run=run, seeds=seed)
        found = pixels_of(painted).astype(int)
        with adapted(pipeline, lora):
            (stock,) = family.sample(pipeline, prompt, side, [seed])
        wanted = np.asarray(stock).astype(int)
        assert wanted.std() > 5
        assert np.abs(found - wanted).mean() < 1
        pictures.append(found)
    assert (pictures[0] != pictures[1]).any()


@pytest.mark.parametrize("name", FAMILIES)
def test_live_draws_are_those_of_the_host(make, name):
    """The first use of a crop is a bank's draw; a later one is the same crop at another level."""
    made = make(name)
    host = Bank(made.folder / "host")
    draws = er.live(made.bundle.folder, made.folder / "images")
    for number in range(min(RING, DRAWS)):
        assert draws.draw(number) == host.index.draws[number]
        for key, value in host[number].items():
            error = np.abs(value - draws[number][key]).max()
            assert error <= RELATIVE * np.abs(value).max(), key
    for use in range(1, USES):
        for place in range(RING):
            first, later = draws.draw(place), draws.draw(use * RING + place)
            assert later.crop == first.crop
            assert (later.image, later.u, later.v) == (first.image, first.u, first.v)
            assert later.seed != first.seed


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["fresh", "through"])
@pytest.mark.parametrize("name", ["sana", "flux-dev"])
def test_tails_that_run_need_no_tail_in_the_bank(make, name, tail):
    made = make(name, tail=tail)
    host, device = (Bank(made.folder / where, made.plan.identity()) for where in ("host", "device"))
    assert host.identity == device.identity
    for wanted, found in zip(host, device, strict=True):
        assert "tail_residual" not in wanted
        assert wanted.keys() == found.keys()
        for key, value in wanted.items():
            assert np.abs(value - found[key]).max() <= RELATIVE * np.abs(value).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "compute"),
    [
        ("int8", "float32"),
        ("float16", "float32"),
        ("int4", "float32"),
        ("int8", "int8-rotated"),
    ],
)
def test_a_bank_is_made_with_the_weights_that_the_device_holds(make, weights, compute):
    made = make("sana", weights=weights, compute=compute)
    host, device = (Bank(made.folder / where, made.plan.identity()) for where in ("host", "device"))
    whole = Bank(make("sana").folder / "host")
    for number in range(DRAWS):
        wanted, found = host[number], device[number]
        for key, value in wanted.items():
            assert np.abs(value - found[key]).max() <= RELATIVE * np.abs(value).max(), key
        moved = np.abs(wanted["tail_residual"] - whole[number]["tail_residual"]).max()
        assert moved > 10 * np.abs(wanted["tail_residual"] - found["tail_residual"]).max()


def test_a_crop_is_encoded_once(make):
    made = make("sana")
    parts, encoded = open_parts(made.bundle), []
    real = parts.encode
    parts.encode = lambda pixels, seed: encoded.append(seed) or real(pixels, seed)
    images = api.read_pictures(read_job(made.folder / "job.toml"), made.plan)
    draws = LiveDraws(parts, images, "images")
    for step in range(RING * USES + 1):
        draws[step]
    assert len(encoded) == len(set(encoded)) == RING + 1


def test_a_stopped_collection_and_a_paused_and_stopped_run_go_on(make, tmp_path):
    made = make("sana")
    shutil.copytree(made.folder / "device", tmp_path / "bank")
    (tmp_path / "bank" / "shard-00000.safetensors").unlink()
    er.collect(made.bundle.folder, made.folder / "images", tmp_path / "bank")
    for path in (made.folder / "device").iterdir():
        assert path.read_bytes() == (tmp_path / "bank" / path.name).read_bytes()

    def train(folder: str, **options: object) -> er.Run:
        draws = er.live(made.bundle.folder, made.folder / "images")
        return er.train(made.bundle.folder, draws, tmp_path / folder, **options)  # type: ignore[arg-type]

    train("whole", target="onnx:streamed")
    pause = iter([er.Wait(0.01), None, er.Wait(0.01), None, True])
    train("run", target="onnx:streamed", on_step=lambda _done, _loss: next(pause))
    assert RunFolder(tmp_path / "run").read().done == 2
    assert train("run", resume=True).done == STEPS
    adapters = [tmp_path / name / "adapter.safetensors" for name in ("whole", "run")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_previews_grow_while_it_trains(make):
    run = make("sana").folder / "run"
    assert sorted(path.name for path in (run / "previews").iterdir()) == [
        f"{step:06d}-0.png" for step in (0, 2, 4)
    ]
    pictures = [pixels_of(path) for path in sorted((run / "previews").iterdir())]
    assert (pictures[0] != pictures[-1]).any()
    assert pixels_of(run / "previews.png").shape[1] == 3 * pictures[0].shape[0]
    page = (run / "run.html").read_text()
    assert "previews.png" in page
    assert page.count('<img src="data:image/jpeg;base64,') == 3
    assert pipelines.LONG.strip() in page
    assert f"{STEPS} of {STEPS} steps" in page


def test_a_bundle_without_the_loops_parts(road, tmp_path):
    for call in (
        lambda: er.collect(road.bundle, road.folder / "images", tmp_path / "bank"),
        lambda: er.live(road.bundle, road.folder / "images"),
        lambda: er.paint(road.bundle, "a sks toy", tmp_path / "p.png"),
    ):
        with pytest.raises(BadInput, match="loop = true"):
            call()
    assert not list(tmp_path.iterdir())


def test_prompts_that_the_bundle_lacks(make, tmp_path):
    made = make("sana")
    with pytest.raises(BadInput, match="no prompt 'a cat'"):
        er.paint(made.bundle.folder, "a cat", tmp_path / "p.png")
    with pytest.raises(BadInput, match="no negative prompt 'blurry'"):
        er.paint(made.bundle.folder, pipelines.SHORT, tmp_path / "p.png", negative="blurry")
    images = made.folder / "images"
    with pytest.raises((BadInput, ManyFaults), match="no prompt 'a dog'"):
        er.collect(made.bundle.folder, images, tmp_path / "bank", prompt="a dog")
    assert not list(tmp_path.iterdir())


def test_names_and_runs_that_do_not_fit(make, tmp_path):
    made = make("sana")
    with pytest.raises(BadInput, match="png"):
        er.paint(made.bundle.folder, pipelines.SHORT, tmp_path / "p.gif")
    other = make("flux-dev")
    with pytest.raises(BadInput, match="another bundle"):
        er.paint(made.bundle.folder, pipelines.SHORT, tmp_path / "p.png", run=other.folder / "run")
    assert not list(tmp_path.iterdir())


def test_a_bank_that_another_bundle_made(make, tmp_path):
    made, other = make("sana"), make("flux-dev")
    with pytest.raises(BadInput, match="another plan"):
        er.train(made.bundle.folder, other.folder / "device", tmp_path / "run")
    with pytest.raises(BadInput, match="another plan"):
        er.collect(made.bundle.folder, made.folder / "images", other.folder / "device")


def test_pictures_of_odd_sizes(make, tmp_path):
    """Very wide, tiny, gray, with alpha: as the host reads them."""
    made = make("sana")
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number, (shape, mode) in enumerate(
        [((64, 500, 3), "RGB"), ((9, 7, 3), "RGB"), ((201, 97), "L"), ((80, 64, 4), "RGBA")]
    ):
        pixels = rng.integers(0, 255, shape, np.uint8)
        Image.fromarray(pixels, mode).save(images / f"{number}.png")
    job = read_job(made.folder / "job.toml")
    moved = job.model_copy(update={"data": job.data.model_copy(update={"images": images})})
    plan = made.plan
    api.precompute(plan, api.read_pictures(moved, plan), tmp_path / "host")
    er.collect(made.bundle.folder, images, tmp_path / "device")
    for wanted, found in zip(Bank(tmp_path / "host"), Bank(tmp_path / "device"), strict=True):
        for key, value in wanted.items():
            assert np.abs(value - found[key]).max() <= RELATIVE * np.abs(value).max()


@pytest.mark.slow
def test_patches_and_pictures_larger_than_a_tile(tmp_path, monkeypatch):
    """Host and device cut the same tiles."""
    for module in ("planning.plan", "reference.loop", "app.claims"):
        monkeypatch.setattr(f"edge_dit.{module}.TILE", 16)
    monkeypatch.setattr("edge_dit_export.targets.loop.TILE", 16)
    job = read_job(write_world(tmp_path, "sana", draws=DRAWS, steps=STEPS))
    plan = make_plan(job)
    assert plan.tile == 16
    api.precompute(plan, api.read_pictures(job, plan), tmp_path / "host")
    bundle = api.export(plan, tmp_path / "bundle", ["onnx"], job=job)
    er.collect(bundle.folder, tmp_path / "images", tmp_path / "device")
    for wanted, found in zip(Bank(tmp_path / "host"), Bank(tmp_path / "device"), strict=True):
        for key, value in wanted.items():
            assert np.abs(value - found[key]).max() <= RELATIVE * np.abs(value).max()
    certificate = api.verify(bundle.folder, tmp_path / "device", steps=2)
    assert certificate.passed
    assert certificate.targets["onnx (loop)"].worst["paint"].relative < RELATIVE


def test_the_commands(make, run, tmp_path):
    made = make("sana")
    bundle, images = made.bundle.folder, made.folder / "images"
    code, out, _ = run("collect", bundle, "--images", images, "-o", tmp_path / "bank", "--json")
    assert code == 0
    assert json.loads(out)["draws"] == DRAWS
    options = ("--images", images, "-o", tmp_path / "run", "--target", "onnx:streamed")
    assert run("train", bundle, *options)[0] == 0
    sheet = ("-o", tmp_path / "sheet.png", "--run", tmp_path / "run", "--seed", 1, "--seed", 2)
    code, out, _ = run("paint", bundle, pipelines.SHORT, pipelines.LONG.strip(), *sheet)
    assert code == 0
    assert "4 painted" in out
    assert pixels_of(tmp_path / "sheet.png").shape[1] == 2 * made.plan.s_max
    code, _, err = run("train", bundle, "-o", tmp_path / "other")
    assert code == 2
    assert "--bank" in err
    code, _, err = run("train", bundle, "-o", tmp_path / "o", "--bank", "b", "--prompt", "a cat")
    assert code == 2
    assert "has its pictures and prompts already" in err


def test_what_a_command_would_not_use_is_said(run, road, tmp_path):
    """The loop's parts without the target that has them; prompts without the loop."""
    written = ("-o", tmp_path / "bundle", "--target", "executorch", "--loop")
    assert run("plan", road.job, "-o", tmp_path / "plan.json")[0] == 0
    code, _, err = run("export", road.job, "--plan", tmp_path / "plan.json", *written)
    assert code == 2
    assert "onnx among the targets" in err
    assert not (tmp_path / "bundle").exists()
    job = road.job.parent / "prompts.toml"
    job.write_text(road.job.read_text().replace("[export]", '[export]\nprompts = ["a cat"]'))
    assert "prompts are not encoded" in run("plan", job, "-o", tmp_path / "p.json")[2]
