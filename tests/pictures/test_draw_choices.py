"""What becomes of captions, repeats, weights, several subjects and prior draws."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from edge_dit.contract.bank import Listed
from edge_dit.contract.objective import FlowMatching
from edge_dit.errors import BadInput
from edge_dit.pictures.crop import CropRule
from edge_dit.pictures.dataset import SubjectFolder, read_folders, survey, with_prior
from edge_dit.pictures.draws import BankRequest, Drawn, DrawRule, bank_index, drawn_of, prompts_of

LEVEL = FlowMatching((np.arange(1, 1001) / 1000).astype(np.float32)).level
CROPS = CropRule(8, 16, 4)


@pytest.fixture
def folder(tmp_path):
    for name in ("toys/a.png", "toys/b.png", "toys/3_more/c.png", "cats/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (20, 16)).save(tmp_path / name)
    (tmp_path / "toys" / "a.txt").write_text("a red toy\n\n a toy, red \na red toy\n")
    return tmp_path


def read(folder, **how):
    return read_folders([SubjectFolder(folder / "toys", "default", **how)], 16)


def index_of(pictures, draws=400, share=0.0):
    return bank_index(BankRequest("plan", draws, 7, CROPS, "float32", 1, share), pictures, LEVEL)


def test_each_draw_takes_one_of_the_lines(folder):
    first, _ = read(folder, caption_lines=True)
    assert first.captions == ("a red toy", "a toy, red")
    (one, _), index = read(folder), index_of(read(folder, caption_lines=True))
    assert one.captions == ("a red toy\n\n a toy, red \na red toy",)
    used = Counter(index.prompts[draw.prompt] for draw in index.draws if draw.image == 0)
    assert used.keys() == {"a red toy", "a toy, red"}
    assert min(used.values()) > 60


def test_a_trigger_goes_before_captions_that_lack_it(folder):
    (folder / "toys" / "b.txt").write_text("my SKS toy")
    captions = [p.captions for p in read(folder, trigger="sks", caption_lines=True)]
    assert captions == [("sks, a red toy", "sks, a toy, red"), ("my SKS toy",)]


def test_dropped_captions_are_the_empty_prompt(folder):
    index = index_of(read(folder, caption_dropout=0.25))
    assert index.prompts[-1] == ""
    empty = sum(index.prompts[draw.prompt] == "" for draw in index.draws)
    assert 60 < empty < 140
    again = index_of(read(folder, caption_dropout=0.25))
    assert again == index


def test_a_bank_without_choices_is_that_of_before(folder):
    listed = index_of(read(folder)).as_json()["images"]
    assert [entry.keys() for entry in listed] == [{"name", "sha256"}] * 2


def test_repeats_of_folders_tables_and_subjects_multiply(folder):
    (folder / "toys" / "metadata.jsonl").write_text('{"file_name": "b.png", "repeats": 2}\n')
    pictures = read(folder, recursive=True, folder_repeats=True, repeats=2)
    assert [(p.name, p.repeats) for p in pictures] == [
        ("3_more/c.png", 6),
        ("a.png", 2),
        ("b.png", 4),
    ]
    drawn = Counter(draw.image for draw in index_of(pictures, 120).draws)
    assert drawn == {0: 60, 1: 20, 2: 40}
    notes = survey(folder / "toys", True).notes
    assert any("folder_repeats = true" in note.reason for note in notes)
    assert not survey(folder / "toys", True, True).notes


def test_levels_of_a_repeated_picture_are_spread(folder):
    pictures = [Drawn((16, 16), (0,), repeats=3), Drawn((16, 16), (0,))]
    draws = DrawRule(1, LEVEL, pictures, CROPS).draws(400)
    for image in (0, 1):
        sigmas = np.array([draw.sigma for draw in draws if draw.image == image])
        counts, _ = np.histogram(sigmas, bins=10, range=(0, 1))
        assert counts.max() - counts.min() <= 4


def test_weights_come_from_a_table_and_from_the_subject(folder):
    (folder / "toys" / "metadata.csv").write_text("file_name,weight\na.png,0.5\n")
    assert [p.weight for p in read(folder, weight=4.0)] == [2.0, 4.0]
    assert index_of(read(folder, weight=4.0)).images[0].weight == 2.0


@pytest.mark.parametrize(
    "row",
    ['"repeats": 0', '"repeats": 1.5', '"weight": 0', '"weight": "x"', '"repeats": 2000'],
)
def test_counts_out_of_bounds_are_refused_with_their_line(folder, row):
    (folder / "toys" / "metadata.jsonl").write_text(f'\n{{"file_name": "a.png", {row}}}\n')
    with pytest.raises(BadInput, match=r"metadata.jsonl:2(.|\n)*whole number from 1 to 1000"):
        survey(folder / "toys")


def test_several_subjects_take_turns_under_names_of_their_own(folder):
    subjects = [
        SubjectFolder(folder / "toys", "a sks toy"),
        SubjectFolder(folder / "cats", "a zwx cat", repeats=2),
    ]
    pictures = read_folders(subjects, 16)
    assert [p.name for p in pictures] == ["a.png", "b.png", "2-cats/a.png"]
    index = index_of(pictures, 8)
    assert [draw.image for draw in index.draws] == [0, 1, 2, 2, 0, 1, 2, 2]
    assert index.prompts[index.draws[2].prompt] == "a zwx cat"


@pytest.mark.parametrize("share", [0.25, 1 / 3, 0.5, 0.9])
def test_prior_draws_are_a_sequence_of_their_own(folder, share):
    pictures = read(folder)
    both = with_prior(pictures, ["a toy", "a box"], 2.0)
    index, plain = index_of(both, 240, share), index_of(pictures, 240)
    prior = [draw for draw in index.draws if index.images[draw.image].prior]
    own = [draw for draw in index.draws if not index.images[draw.image].prior]
    assert len(prior) == int(240 * share)
    assert {index.prompts[draw.prompt] for draw in prior} == {"a toy", "a box"}
    assert {index.images[draw.image].weight for draw in prior} == {2.0}
    same = [(draw.image, draw.sigma) for draw in plain.draws[: len(own)]]
    assert [(draw.image, draw.sigma) for draw in own] == same
    longest = max(np.diff([0, *(n for n, d in enumerate(index.draws) if d in own), 240]))
    assert longest <= 1 / (1 - share) + 1


def test_an_entry_of_the_index_has_all_that_its_draws_follow_from(folder):
    pictures = with_prior(read(folder, caption_dropout=0.1), ["a toy"], 2.0)
    drawn = drawn_of(pictures, prompts_of(pictures))
    listed = index_of(pictures, share=0.5).images
    for of, picture, entry in zip(drawn, pictures, listed, strict=True):
        assert entry == Listed(
            picture.name,
            picture.sha256,
            of.choice,
            picture.dropout,
            picture.repeats,
            picture.weight,
            picture.prior,
        )
        assert Drawn(of.size, entry.prompts or of.prompts, entry.dropout, 1, entry.prior) == of
