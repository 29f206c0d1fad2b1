"""A job that asks for everything at once: masks, priors, captions that change, half an optimizer.
It is exact on every target, and a stop changes no bit of it.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import tiny
from edge_dit.app import api
from edge_dit.contract import bank as banks
from edge_dit.contract.names import WEIGHT_MASK
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.store.tensors import TensorFile

DATA = """trigger = "sks"
caption_lines = true
caption_dropout = 0.2
repeats = 2
weight = 0.5

[[data.subjects]]
images = "others"
prompt = "a green box"

[prior]
prompt = ["a box", "a toy"]
images = 2
share = 0.25

[plan]"""
TRAIN = """rank_stabilized = true
beta1 = 0.0
loraplus_lr_ratio = 4.0
schedule = "cosine"
warmup = 3
accumulate = 2
ema = 0.3
steps = 12"""
STOPS = (1, 2, 5, 8)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(workplace, tmp_path_factory):
    """Job, plan, pictures, bank and bundle."""
    folder = tmp_path_factory.mktemp("everything")
    (folder / "model").symlink_to(workplace / "model")
    shutil.copytree(workplace / "images", folder / "images")
    pictures = sorted((folder / "images").glob("*.png"))
    (folder / "others").mkdir()
    shutil.move(pictures[2], folder / "others")
    with Image.open(pictures[0]) as picture:
        mask = np.zeros((picture.height, picture.width), np.uint8)
    mask[:, : mask.shape[1] // 2] = 255
    Image.fromarray(mask).save(pictures[0].with_suffix(".mask.png"))
    pictures[0].with_suffix(".txt").write_text("a toy\na toy at the left\n")
    changes = ("[plan]", DATA), ("steps = 12", TRAIN), ("draws = 10", "draws = 16")
    job = read_job(tiny.write_job(folder, *changes))
    plan = make_plan(job)
    read = api.read_pictures(job, plan)
    api.precompute(plan, read, folder / "bank")
    api.export(plan, folder / "bundle", job=job)
    return SimpleNamespace(
        plan=plan, pictures=read, bank=folder / "bank", bundle=folder / "bundle", folder=folder
    )


def command(*words: object) -> str:
    """Run edge-dit, in a process of its own: ExecuTorch could end ours."""
    program = Path(sys.executable).with_name("edge-dit")
    done = subprocess.run([program, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_job_has_what_it_says(made):
    index = banks.Bank(made.bank, made.plan.identity()).index
    assert made.plan.masked
    assert made.plan.weighted
    assert sum(image.prior for image in index.images) == 2
    captions = {"sks, a toy", "sks, a toy at the left", "a green box"}
    assert {*captions, "", "a box", "a toy"} <= set(index.prompts), index.prompts
    assert {image.weight for image in index.images if not image.prior} == {0.5, 1.0}
    assert WEIGHT_MASK in banks.Bank(made.bank)[0]


def test_a_stopped_bank_has_the_same_bytes(made, tmp_path):
    again = tmp_path / "bank"
    shutil.copytree(made.bank, again)
    banks.shard_path(again, 0).unlink()
    api.precompute(made.plan, made.pictures, again)
    for path in sorted(made.bank.iterdir()):
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


@pytest.mark.parametrize("target", ["onnx:fused", "ort-training", "executorch"])
def test_a_stopped_run_has_the_same_bits(made, tmp_path, target):
    given = (made.bundle, "--bank", made.bank, "--target", target)
    command("train", *given, "-o", tmp_path / "whole")
    stopped = tmp_path / "stopped"
    for number, step in enumerate(STOPS):
        code = (
            "import sys; import edge_dit_runtime as er\n"
            "er.train(*sys.argv[1:4], target=sys.argv[4], resume=sys.argv[5] == '1',"
            " on_step=lambda done, _: done == int(sys.argv[6]))"
        )
        words = (made.bundle, made.bank, stopped, target, int(number > 0), step)
        subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True)
    command("train", *given, "-o", stopped, "--resume")
    for name in ("state.safetensors", "adapter.safetensors", "loss.csv"):
        assert (stopped / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    state = TensorFile(stopped / "state.safetensors").read()
    assert not [name for name in state if name.startswith("exp_avg.")]


def test_every_target_is_exact(made):
    told = command("verify", made.bundle, "--bank", made.bank, "--images", made.folder / "images")
    assert "FAILED" not in told
