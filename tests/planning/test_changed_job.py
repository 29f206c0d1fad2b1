"""A job that was changed, or moved, after its plan."""

import json
import re
import shutil
import tomllib

import pytest

import tiny
from edge_dit.errors import BadInput
from edge_dit.models import whereabouts
from edge_dit.models.whereabouts import known_folders, remember
from edge_dit.planning.job import Job, read_job
from edge_dit.planning.make import make_plan, plan_of
from edge_dit.planning.plan import model_of, read_plan, write_plan

OTHER = {
    "model.revision": '"v0"',
    "model.variant": '"fp16"',
    "data.prompt": '"another toy"',
    "data.recursive": "true",
    "data.trigger": '"sks"',
    "data.caption_lines": "true",
    "data.caption_dropout": "0.1",
    "data.folder_repeats": "true",
    "data.alpha_masks": "true",
    "data.repeats": "2",
    "data.weight": "0.5",
    "data.subjects": '[{images = "images", prompt = "another toy"}]',
    "prior.prompt": '"a toy"',
    "prior.images": "2",
    "prior.share": "0.5",
    "prior.weight": "2.0",
    "plan.skip_ratio": "0.25",
    "plan.head_skip": "2",
    "plan.tail_skip": "0",
    "plan.inner_skips": "[[2, 3]]",
    "plan.tail": '"through"',
    "train.resolution": "128",
    "train.patch": "64",
    "train.rank": "2",
    "train.alpha": "3.5",
    "train.lora_targets": '["attn1.to_k"]',
    "train.lr": "2e-3",
    "train.beta1": "0.0",
    "train.window": "true",
    "train.surroundings": "true",
    "train.loraplus_lr_ratio": "4.0",
    "train.schedule": '"cosine"',
    "train.warmup": "3",
    "train.accumulate": "2",
    "train.ema": "0.9",
    "train.rank_stabilized": "true",
    "train.steps": "13",
    "train.draws": "11",
    "train.bank": '"float16"',
    "train.seed": "4",
    "export.targets": '["onnx"]',
    "export.weights": '"int8"',
    "export.compute": '"int8"',
    "export.recompute": "true",
    "export.loop": "true",
    "export.prompts": '["a toy"]',
    "export.negative_prompt": '"blurry"',
    "train.preview_every": "2",
}
"""Another value for every key that has no path in it; budgets stand below."""
BUDGETS = {"plan.ram": '"3GiB"', "plan.flash": '"2GiB"', "plan.step_time": '"5s"'}


@pytest.fixture(scope="module")
def planned(workplace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("changed")
    for name in ("model", "images"):
        (folder / name).symlink_to(workplace / name)
    (folder / "job.toml").write_text(tiny.JOB)
    write_plan(make_plan(read_job(folder / "job.toml")), folder / "plan.json")
    return folder


def changed(key: str, value: str) -> str:
    """The job with another value for "section.key"."""
    section, name = key.split(".")
    if section == "prior":
        prompt = "" if name == "prompt" else 'prompt = "a toy"\n'
        return f"{tiny.JOB}\n[prior]\n{prompt}{name} = {value}\n"
    text = re.sub(rf"(?m)^{name} *=.*\n", "", tiny.JOB)
    return text.replace(f"[{section}]\n", f"[{section}]\n{name} = {value}\n")


def test_every_key_of_a_job_is_tried():
    keys = {
        f"{section}.{key}"
        for section, field in Job.model_fields.items()
        for key in field.annotation.model_fields
    }
    paths = {"model.path", "model.config", "model.use_on", "data.images"}
    assert keys == paths | OTHER.keys() | BUDGETS.keys()


@pytest.mark.parametrize("key", [*OTHER, *BUDGETS])
def test_a_changed_key_is_named_with_both_values(planned, key):
    value = (OTHER | BUDGETS)[key]
    job = planned / f"{key}.toml"
    job.write_text(changed(key, value))
    before = read_plan(planned / "plan.json").asked[key]
    now = read_job(job).asked()[key]
    assert before != now
    with pytest.raises(BadInput) as fault:
        plan_of(read_job(job), planned / "plan.json")
    old = "nothing" if before is None else repr(before)
    changes = fault.value.found.split("; ")
    line = f"{key}: the plan says {old}, the job {now!r}"
    assert any(change == line or change.endswith(f" {line}") for change in changes)
    assert "plan again" in fault.value.remedy


@pytest.mark.parametrize("key", [*OTHER, *BUDGETS])
def test_a_key_that_an_older_plan_does_not_know_had_its_default(planned, tmp_path, key):
    plan = read_plan(planned / "plan.json")
    asked = {name: value for name, value in plan.asked.items() if name != key}
    write_plan(plan.model_copy(update={"asked": asked}), tmp_path / "plan.json")
    given = f"{key.split('.')[1]} = " in tiny.JOB
    if not given:
        plan_of(read_job(planned / "job.toml"), tmp_path / "plan.json")
    job = planned / f"{key}.toml"
    job.write_text(changed(key, (OTHER | BUDGETS)[key]))
    with pytest.raises(BadInput, match=re.escape(key)):
        plan_of(read_job(job), tmp_path / "plan.json")


def test_the_same_job_written_otherwise_is_the_same(planned):
    text = tiny.JOB.replace("alpha = 8", "alpha = 8.0  # as a float") + "\n\n# the end\n"
    assert tomllib.loads(text) == tomllib.loads(tiny.JOB)
    (planned / "spelled.toml").write_text(text.replace("\n", "\r\n"))
    plan = plan_of(read_job(planned / "spelled.toml"), planned / "plan.json")
    assert plan.model == (planned / "model").resolve()


def test_a_folder_that_moved_goes_on(workplace, tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    shutil.copytree(workplace / "model", before / "model")
    shutil.copytree(workplace / "images", before / "images")
    (before / "job.toml").write_text(tiny.JOB)
    write_plan(make_plan(read_job(before / "job.toml")), before / "plan.json")
    before.rename(after)
    plan = plan_of(read_job(after / "job.toml"), after / "plan.json")
    assert model_of(plan).folder == after / "model"
    assert model_of(read_plan(after / "plan.json")).folder == after / "model"


def test_another_model_at_the_jobs_path_is_refused(workplace, tmp_path):
    shutil.copytree(workplace / "model", tmp_path / "model")
    shutil.copytree(workplace / "images", tmp_path / "images")
    (tmp_path / "job.toml").write_text(tiny.JOB)
    write_plan(make_plan(read_job(tmp_path / "job.toml")), tmp_path / "plan.json")
    tiny.transformer(layers=5, in_channels=8, caption_channels=96).save_pretrained(
        tmp_path / "model" / "transformer"
    )
    plan = plan_of(read_job(tmp_path / "job.toml"), tmp_path / "plan.json")
    with pytest.raises(BadInput, match="other weights than the plan was made for"):
        model_of(plan)


def test_a_model_that_nobody_knows_is_asked_for(planned, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan = read_plan(planned / "plan.json").model_copy(update={"model_hash": "0" * 64})
    with pytest.raises(BadInput, match=r"not known on this machine(.|\n)*--model FOLDER"):
        model_of(plan)


def test_a_copy_that_was_deleted_does_not_hide_the_model(planned, workplace, tmp_path):
    plan = read_plan(planned / "plan.json")
    gone = tmp_path / "gone"
    shutil.copytree(workplace / "model", gone)
    remember(gone, plan.model_hash)
    assert model_of(plan).folder == gone
    shutil.rmtree(gone)
    assert model_of(plan).folder.is_dir()


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1, null]", b"\xff", b'["/nowhere/at/all"]'])
def test_damaged_notes_are_no_notes(monkeypatch, tmp_path, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(whereabouts, "_NOTED", {})
    remember(tmp_path, "a" * 64)
    (notes,) = (tmp_path / "edge-dit" / "models").iterdir()
    notes.write_bytes(damage)
    assert known_folders("toy", "a" * 64) == [tmp_path]  # this process knows it still
    whereabouts._NOTED.clear()
    with pytest.raises(BadInput, match="model toy"):
        known_folders("toy", "a" * 64)


def test_a_plan_holds_no_path(planned, workplace):
    text = (planned / "plan.json").read_text()
    assert str(planned) not in text
    assert str(workplace) not in text
    assert json.loads(text)["model_name"] == "model"
