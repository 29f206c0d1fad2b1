"""Numbers of a job that contradict each other are said before any work."""

from dataclasses import asdict

import pytest

import tiny
from edge_dit.app.describe import bank_in_words
from edge_dit.app.planner import plan_job
from edge_dit.contract.bank import Crop, Draw, Index, Listed
from edge_dit.planning.doubts import MOST_PASSES, doubts
from edge_dit.planning.job import Train, read_job
from edge_dit.store.documents import write_document

NAMES = [f"{n}.png" for n in range(8)]


def numbers(steps, draws):
    return Train(resolution=64, patch=32, steps=steps, draws=draws)


@pytest.mark.parametrize(("steps", "draws"), [(8, 8), (12, 10), (500, 256), (8 * MOST_PASSES, 8)])
def test_usual_numbers_say_nothing(steps, draws):
    assert doubts(numbers(steps, draws), NAMES) == []


def test_fewer_draws_than_pictures():
    (said,) = doubts(numbers(4, 4), NAMES)
    assert said.startswith("4 of 8 pictures are never drawn (4.png, 5.png, 6.png, ...): draws = 4")
    assert said.endswith("draws to 8 or more")
    (one,) = doubts(numbers(7, 7), NAMES)
    assert one.startswith("1 of 8 pictures are never drawn (7.png): draws = 7")


def test_fewer_steps_than_draws():
    (said,) = doubts(numbers(100, 256), NAMES)
    assert said.startswith("156 of 256 draws are never trained on: steps = 100")


def test_many_passes_over_few_draws():
    (said,) = doubts(numbers(10_000, 16), NAMES)
    assert said.startswith("each of 16 draws is trained on 625 times: steps = 10000")
    assert said.endswith("draws to 1000 or more")
    assert doubts(numbers(10_000, 1000), NAMES) == []


def test_a_plan_warns_and_keeps_them(workplace, tmp_path, capsys):
    for name in ("model", "images"):
        (tmp_path / name).symlink_to(workplace / name)
    text = tiny.JOB.replace("draws = 10", "draws = 2").replace("steps = 12", "steps = 2")
    (tmp_path / "job.toml").write_text(text)
    planned = plan_job(read_job(tmp_path / "job.toml"))
    (said,) = planned.doubts
    assert said.startswith("1 of 3 pictures are never drawn")
    assert f"warning: {said}" in capsys.readouterr().err


def test_a_bank_says_how_many_of_its_images_are_drawn(tmp_path):
    draw = Draw(1, 0, 0, 0.5, 0.5, 0.5, Crop(0, 0, 32))
    images = [Listed(name, "0") for name in NAMES]
    index = Index("hash", images, ["a toy"], [draw] * 4)
    write_document(tmp_path / "bank" / "index.json", asdict(index))
    assert "8 images (1 of them drawn), 1 prompts" in bank_in_words(tmp_path / "bank")[1]
