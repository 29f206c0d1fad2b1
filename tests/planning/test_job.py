"""job.toml: faults come with line and remedy, all together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_dit.errors import BadInput, ManyFaults
from edge_dit.planning.job import read_job
from tiny import JOB


@pytest.fixture
def job_file(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "images").mkdir()

    def write(text: str):
        path = tmp_path / "job.toml"
        path.write_text(text)
        return path

    return write


def test_paths_are_relative_to_the_file(job_file):
    path = job_file(JOB)
    job = read_job(path)
    assert job.model.path == path.parent / "model"
    assert job.train.lr == 1e-3


def test_all_faults_at_once_with_their_lines(job_file):
    text = JOB.replace('path = "model"', 'path = "nowhere"').replace("rank = 4", "rank = 0")
    text = text.replace("seed = 3", "sead = 3").replace("patch = 32", "patch = 128")
    with pytest.raises(ManyFaults) as caught:
        read_job(job_file(text))
    message = str(caught.value)
    lines = text.splitlines()
    for line in ('path = "nowhere"', "rank = 0", "sead = 3", "patch = 128"):
        assert f":{lines.index(line) + 1}: " in message, message
    assert "unknown key train.sead" in message
    assert "resolution, patch, window, surroundings, rank" in message  # the known keys are listed


def test_missing_folders_are_named(job_file):
    text = JOB.replace('images = "images"', 'images = "photos"').replace('"model"', '"nowhere"')
    with pytest.raises(ManyFaults) as caught:
        read_job(job_file(text))
    assert "photos" in str(caught.value)
    assert "nowhere" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (("draws = 10", "draws = 0"), "train.draws"),
        (("[train]", "[trian]"), "trian"),
        (('"onnx"', '"coreml"'), "coreml"),
        (("alpha = 8", "alpha = -1"), "train.alpha"),
        (("head_skip = 1", "head_skip = -1"), "plan.head_skip"),
        (("lr = 1e-3", 'lr = "fast"'), "train.lr"),
        (("lr = 1e-3", "accumulate = 5"), "accumulate = 5 with train.steps = 12"),
        (("lr = 1e-3", "ema = 1.0"), "train.ema"),
        (("head_skip = 1", 'ram = "much"'), "plan.ram"),
    ],
)
def test_single_faults(job_file, change, word):
    with pytest.raises(BadInput, match=word):
        read_job(job_file(JOB.replace(*change)))


def test_not_toml(job_file):
    with pytest.raises(BadInput, match="not valid TOML"):
        read_job(job_file("[model\npath="))


@given(text=st.text(max_size=200))
def test_any_text_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("job") / "job.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput):
        read_job(path)
