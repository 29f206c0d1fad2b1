"""A job's model measured: what `select` reads, and where it writes."""

import shutil

import pytest

from edge_dit.app.planner import select
from edge_dit.errors import BadInput
from edge_dit.models.model import open_model
from edge_dit.planning.job import read_job
from edge_dit.planning.selection import cache_file, find_selection, read_selection


@pytest.fixture
def job(workplace, tmp_path, monkeypatch):
    """Two steps on one image, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "pet" / "images").mkdir(parents=True)
    shutil.copy(min((workplace / "images").glob("*.png")), tmp_path / "pet" / "images" / "1.png")
    job = read_job(workplace / "job.toml")
    data = job.data.model_copy(update={"images": tmp_path / "pet" / "images"})
    train = job.train.model_copy(update={"steps": 2})
    return job.model_copy(update={"data": data, "train": train})


def test_the_jobs_own_images_are_the_subject(job):
    path = select(job, "loss")
    found = read_selection(path)
    assert path == cache_file(open_model(job.model.path).hash)
    assert (found.method, found.subjects, found.steps) == ("loss-frozen", ["pet"], 2)
    assert found.over == "training images"
    assert find_selection(job.model.path, found.model_hash) == (found, str(path))


def test_a_folder_of_subjects_takes_their_place(job, tmp_path):
    images = job.data.images
    shutil.copytree(images, tmp_path / "subjects" / "cat" / "train")
    shutil.copytree(images, tmp_path / "subjects" / "cat" / "heldout")
    shutil.copytree(images, tmp_path / "subjects" / "dog")
    found = read_selection(select(job, "loss", tmp_path / "subjects"))
    assert found.subjects == ["cat", "dog"]
    assert found.over == "held-out and training images"


def test_wrong_requests_are_refused(job, tmp_path):
    for arguments, place, words in (
        (("guess",), "--method", "generation or loss"),
        (("loss", None, "dinov2"), "--embedding", "with --method loss"),
        (("loss", tmp_path / "nowhere"), str(tmp_path / "nowhere"), "no such folder"),
    ):
        with pytest.raises(BadInput, match=words) as caught:
            select(job, *arguments)
        assert caught.value.where == place
    (tmp_path / "none").mkdir()
    with pytest.raises(BadInput, match="at least one"):
        select(job, "loss", tmp_path / "none")
    assert not cache_file(open_model(job.model.path).hash).exists()
