"""Subjects read from folders, and the model tuned to each of them."""

import json
import shutil

import numpy as np
import pytest
from peft.tuners.tuners_utils import BaseTunerLayer

from edge_dit.errors import BadInput
from edge_dit.pictures.dataset import read_folder
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.reference.evaluate import encode_whole
from edge_dit.reference.full_lora import train_full_lora
from edge_dit.select.subjects import Subject, TunedSubjects, read_subject, read_subjects
from edge_dit.store.documents import write_document


@pytest.fixture
def folders(workplace, tmp_path):
    """cat: an image; dog: one to train on and one held out; heldout: one more subject."""
    first, second, *_ = sorted((workplace / "images").glob("*.png"))
    for source, name in (
        (first, "cat/1.png"),
        (first, "dog/train/1.png"),
        (second, "dog/heldout/2.png"),
        (second, "heldout/2.png"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / name)
    (tmp_path / "notes.txt").write_text("no subject")
    return tmp_path


def names(images):
    return [image.name for image in images]


def test_every_folder_is_a_subject(folders):
    cat, dog, other = read_subjects(folders, "a sks toy", 64)
    assert [cat.name, dog.name, other.name] == ["cat", "dog", "heldout"]
    # A folder of that name next to a subject's own is another subject, not its held-out images.
    assert (names(cat.images), cat.heldout, names(cat.measured)) == (["1.png"], [], ["1.png"])
    assert (names(dog.images), names(dog.heldout)) == (["1.png"], ["2.png"])
    assert names(dog.measured) == ["2.png"]
    assert dog.images[0].caption == "a sks toy"
    assert min(dog.images[0].pixels.shape[1:]) == 64


def test_held_out_images_lie_next_to_those_to_tune_on(folders):
    subject = read_subject("toy", folders / "dog" / "train", "a sks toy", 64)
    assert (subject.name, names(subject.heldout)) == ("toy", ["2.png"])
    shutil.rmtree(folders / "dog" / "heldout")
    assert read_subject("toy", folders / "dog" / "train", "a sks toy", 64).heldout == []


def test_folders_without_subjects_are_refused(folders):
    with pytest.raises(BadInput, match="no such folder"):
        read_subjects(folders / "nowhere", "a sks toy", 64)
    with pytest.raises(BadInput, match="no such folder"):
        read_subjects(folders / "notes.txt", "a sks toy", 64)
    (folders / "empty").mkdir()
    with pytest.raises(BadInput, match="empty"):
        read_subjects(folders, "a sks toy", 64)


@pytest.fixture(scope="module")
def plan(workplace):
    return make_plan(read_job(workplace / "job.toml"))


@pytest.fixture(scope="module")
def toy(workplace, plan):
    return Subject("toy", read_folder(workplace / "images", "a sks toy", plan.s_max)[:1])


def test_the_model_carries_the_lora_only_while_it_is_measured(plan, toy, tmp_path):
    tuned = TunedSubjects(plan, [toy], tmp_path, steps=2)
    transformer = tuned.pipeline.transformer
    encoded = encode_whole(plan, tuned.model, tuned.pipeline, toy.images)
    expected = train_full_lora(plan, tuned.model, tuned.pipeline, encoded, 2)

    def layers():
        return [m for m in transformer.modules() if isinstance(m, BaseTunerLayer)]

    def measure(by, subject, title):
        assert by is tuned
        assert (subject, title) == (toy, "toy (1 of 1), sums")
        found = {n: p for n, p in transformer.named_parameters() if ".lora_" in n}
        assert len(found) == len(expected) == 2 * len(layers()) > 0
        return np.array([[sum(float(p.double().sum()) for p in found.values())]])

    (numbers,), seconds = tuned.measure("sums", {}, 1, [measure])
    assert numbers[0, 0] == pytest.approx(sum(v.sum(dtype=float) for v in expected.values()))
    assert abs(numbers[0, 0]) > 1e-6
    assert seconds > 0
    assert layers() == []
    assert not hasattr(transformer, "peft_config")

    def fails(*_):
        raise RuntimeError("while the LoRA is in place")

    with pytest.raises(RuntimeError, match="in place"):
        tuned.measure("other", {}, 1, [fails])
    assert layers() == []


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"numbers": [[1.0, 2.0]]},
        {"numbers": [[1.0]], "seconds": 1.0},
        {"numbers": [1.0, 2.0], "seconds": 1.0},
        {"numbers": [], "seconds": 1.0},
        {"numbers": [[1.0, 2.0], [1.0]], "seconds": 1.0},
        {"numbers": [[1.0, None]], "seconds": 1.0},
        {"numbers": [["a", "b"]], "seconds": 1.0},
        {"numbers": [[1.0, float("inf")]], "seconds": 1.0},
        {"numbers": [[1.0, 2.0]], "seconds": float("nan")},
        {"numbers": [[1.0, 2.0]], "seconds": [1.0]},
        {"numbers": [[1.0, 2.0]], "seconds": 1.0, "sha256": "0" * 64},
    ],
)
def test_numbers_that_are_not_whole_are_measured_again(plan, toy, tmp_path_factory, content):
    work = tmp_path_factory.getbasetemp() / "not-whole"  # one tuning for all of them
    tuned = TunedSubjects(plan, [toy], work, steps=1)
    calls = []

    def measure(*_):
        calls.append(1)
        return np.array([[0.1, 0.2], [0.3, 0.4]])

    def numbers():
        (found,), _ = tuned.measure("pair", {}, 2, [measure])
        return found.tolist()

    assert numbers() == numbers() == [[0.1, 0.2], [0.3, 0.4]]
    before = len(calls)
    (path,) = work.glob("pair-*.json")
    if isinstance(content, dict):
        write_document(path, content)
    else:
        path.write_text(json.dumps(content))
    assert numbers() == numbers() == [[0.1, 0.2], [0.3, 0.4]]
    assert len(calls) == before + 1
