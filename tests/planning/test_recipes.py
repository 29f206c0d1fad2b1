"""`edge-dit init`: a job that can be planned as it is."""

import json
import tomllib
from pathlib import Path

import pytest

from edge_dit.errors import BadInput
from edge_dit.planning.job import Prior, read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.recipes import first_job

SAMPLES = Path(__file__).resolve().parents[2] / "samples"


@pytest.mark.parametrize(
    ("name", "subject"), [("subject/train", "a sks toy"), ("photos", "a sks cat")]
)
def test_a_job_for_the_samples_is_planned_as_it_is(run, tmp_path, name, subject):
    job = tmp_path / "job.toml"
    where = SAMPLES / name, "--model", SAMPLES / "tiny-sana", "--subject", subject, "-o", job
    code, out, err = run("init", *where, "--json")
    assert code == 0, err
    reasons = json.loads(out)["reasons"]
    assert any("samples/sana.toml" in reason for reason in reasons)
    plan = make_plan(read_job(job))
    assert (plan.s_max, plan.s_min, plan.steps) == (128, 112, 700)
    assert read_job(job).data.prompt == subject
    code, _, err = run("init", *where)
    assert code == 2
    assert "a file is there already" in err


def test_a_budget_and_the_class_of_the_subject_stand_in_it(tmp_path):
    made = first_job(SAMPLES / "photos", str(SAMPLES / "tiny-sana"), "a sks cat", "2GiB", tmp_path)
    assert 'ram = "2GiB"' in made.text
    assert '# prompt = ["a cat", "..."]' in made.text
    assert "skip_ratio" not in made.text
    lines = [line.removeprefix("# ") for line in made.text.splitlines()]
    first = lines.index("[prior]")
    prior = tomllib.loads("\n".join(lines[first : lines.index("[plan]")]))["prior"]
    assert Prior.model_validate(prior).images == 32


def test_a_folder_without_pictures(tmp_path):
    with pytest.raises(BadInput, match="no image in it"):
        first_job(tmp_path, str(SAMPLES / "tiny-sana"), "a sks cat", None, tmp_path)
