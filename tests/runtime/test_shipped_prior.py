"""A prior's bank, made on the host of nobody's pictures, beside a device's own pictures."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import edge_dit_runtime as er
from edge_dit.app import api
from edge_dit.contract.bank import Bank
from edge_dit.errors import BadInput
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.store.documents import read_document, write_document
from edge_dit_runtime.run_folder import RunFolder
from loops import on_device, write_world

DRAWS, SHARE = 9, 1 / 3
PRIOR = f'[prior]\nprompt = ["a box", "a tree"]\nimages = 4\nshare = {SHARE}\n'
RELATIVE = 1e-4
"""Of a tensor's largest value: onnxruntime and torch differ in the last digits."""
DEVICE_DOES = """
er.collect("bundle", "images", "device", prior="prior")
er.train("bundle", "device", "run", target="onnx:streamed")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What a host ships, its own bank of the same pictures, and what a device made."""
    folder = tmp_path_factory.mktemp("shipped")
    path = write_world(folder, "sana", draws=DRAWS, steps=4, lr=0.01)
    path.write_text(path.read_text() + PRIOR)
    job = read_job(path)
    plan = make_plan(job)
    api.precompute(plan, api.read_prior(job, plan), folder / "prior")
    api.precompute(plan, api.read_pictures(job, plan), folder / "host")
    api.export(plan, folder / "bundle", ["onnx"], job=job)
    on_device(folder, DEVICE_DOES)
    banks = {name: Bank(folder / name, plan.identity()) for name in ("prior", "host", "device")}
    return SimpleNamespace(folder=folder, job=path, plan=plan, **banks)


def priors(bank: Bank) -> list[int]:
    return [n for n, draw in enumerate(bank.index.draws) if bank.index.images[draw.image].prior]


def test_it_has_the_plans_prior_draws_and_nobodys_pictures(made):
    assert len(made.prior) == len(priors(made.host)) == 3
    assert {image.name for image in made.prior.index.images} == {f"prior-{n}.png" for n in range(4)}
    assert set(made.prior.index.prompts) == {"a box", "a tree"}


def test_a_devices_bank_has_the_hosts_draws(made):
    assert made.device.identity == made.host.identity
    for number in range(DRAWS):
        wanted, found = made.host[number], made.device[number]
        assert wanted.keys() == found.keys()
        for name, value in wanted.items():
            if number in priors(made.host) and not name.startswith("cond."):
                np.testing.assert_array_equal(found[name], value, err_msg=f"{name}, draw {number}")
            error = np.abs(value - found[name]).max()
            assert error <= RELATIVE * np.abs(value).max(), f"{name} of draw {number}"


def test_the_device_trained_on_it(made):
    assert RunFolder(made.folder / "run").read().done == 4
    assert (made.folder / "run" / "adapter.safetensors").is_file()


def test_a_stopped_bank_goes_on(made, tmp_path):
    at = made.folder
    er.collect(at / "bundle", at / "images", tmp_path / "bank", prior=at / "prior")
    (shard,) = tmp_path.glob("bank/shard-*")
    before = shard.read_bytes()
    shard.unlink()
    er.collect(at / "bundle", at / "images", tmp_path / "bank", prior=at / "prior")
    assert shard.read_bytes() == before


def refused(made, folder: Path, prior: Path | None) -> BadInput:
    at = made.folder
    with pytest.raises(BadInput) as caught:
        er.collect(at / "bundle", at / "images", folder / "new", prior=prior)
    assert not (folder / "new").exists()
    return caught.value


def test_what_is_no_prior_of_the_plan_is_refused(made, tmp_path):
    assert "--prior" in refused(made, tmp_path, None).remedy
    assert "a bank of a subject" in refused(made, tmp_path, made.folder / "host").found
    index = read_document(made.folder / "prior" / "index.json", "", "")
    index["draws"][1]["sigma"] /= 2
    for path in (made.folder / "prior").iterdir():
        (tmp_path / "prior").mkdir(exist_ok=True)
        (tmp_path / "prior" / path.name).write_bytes(path.read_bytes())
    write_document(tmp_path / "prior" / "index.json", index)
    assert "other draws" in refused(made, tmp_path, tmp_path / "prior").found


def test_it_teaches_no_subject(made, tmp_path):
    with pytest.raises(BadInput, match="teaches no subject"):
        er.train(made.folder / "bundle", made.folder / "prior", tmp_path / "run")
    with pytest.raises(BadInput, match="a plan with"):
        er.live(made.folder / "bundle", made.folder / "images")


def test_a_prior_of_the_subjects_pictures_is_not_shipped(made, tmp_path, run):
    text = made.job.read_text().replace("images = 4\n", "")
    other = made.folder / "other.toml"
    other.write_text(text)
    assert run("plan", other, "-o", tmp_path / "plan.json")[0] == 0
    words = ("--plan", tmp_path / "plan.json", "--prior", "-o", tmp_path / "bank")
    code, _, said = run("precompute", other, *words)
    assert code == 2
    assert "images = 16" in said
    assert not (tmp_path / "bank").exists()


def test_the_command_line_makes_and_takes_it(made, tmp_path, run):
    at = made.folder
    assert run("plan", made.job, "-o", tmp_path / "plan.json")[0] == 0
    words = ("--plan", tmp_path / "plan.json", "--prior", "-o", tmp_path / "prior")
    assert run("precompute", made.job, *words)[0] == 0
    assert Bank(tmp_path / "prior").identity == made.prior.identity
    words = ("--images", at / "images", "--prior", tmp_path / "prior", "-o", tmp_path / "bank")
    assert run("collect", at / "bundle", *words)[0] == 0
    assert Bank(tmp_path / "bank").identity == made.host.identity
