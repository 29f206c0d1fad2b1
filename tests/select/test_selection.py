"""Which blocks to skip: the choice, its file, and the ways of measuring it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import BaseTunerLayer

import pipelines
from edge_dit.contract.adapter import write_adapter_folder
from edge_dit.contract.split import inner_runs as runs_between
from edge_dit.contract.split import trained_blocks
from edge_dit.errors import BadInput
from edge_dit.models.families.sana import FAMILY
from edge_dit.models.model import Model, open_model
from edge_dit.models.pipeline import load_pipeline
from edge_dit.models.subgraph import TrainableSubgraph, as_batch, difference
from edge_dit.pictures.dataset import Captioned, read_folder
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import model_of
from edge_dit.planning.selection import (
    NAME,
    cache_file,
    find_selection,
    read_selection,
    write_selection,
)
from edge_dit.reference.evaluate import adapted, encode_whole, whole_loss
from edge_dit.reference.full_lora import train_full_lora
from edge_dit.select import inner_runs, selectors, subjects
from edge_dit.select.embedding import distance, embedder
from edge_dit.select.masking import text_masked
from edge_dit.select.replay import LEVELS, UNSEEN
from edge_dit.select.selectors import Drawn, select_by_generation, select_by_loss
from edge_dit.select.subjects import Subject
from edge_dit.store.documents import write_document
from selections import HASH, between, selection

SAMPLES = Path(__file__).resolve().parents[2] / "samples"

# ---------------------------------------------------------------- the choice

steps = st.integers(-2, 4).map(lambda n: n / 2)  # few values, so that scores tie


@st.composite
def selections(draw):
    layers = draw(st.integers(1, 12))
    head, tail = (draw(st.lists(steps, min_size=layers, max_size=layers)) for _ in range(2))
    return selection([0, *head], [0, *tail])


@settings(max_examples=200, deadline=None)
@given(selections(), st.data())
def test_best_is_the_smallest_score_and_of_ties_the_longest_head(found, data):
    skipped = data.draw(st.integers(0, found.layers - 1))
    n, m = found.best(skipped)
    assert n + m == skipped
    for head in range(skipped + 1):
        score = found.head[head] + found.tail[skipped - head]
        assert score >= found.score(n, m)
        assert score > found.score(n, m) or head <= n


def test_a_run_between_is_proposed_where_it_is_better_by_two_errors():
    splits = [between(), between(head=1, run=(2, 3), gain=0.09), between(run=(1, 4), gain=-1.0)]
    found = selection(range(6), range(6), between=splits)
    assert [split.skipped for split in found.between] == [1, 2, 3]
    assert found.proposed(1) == found.between[0]
    assert [found.proposed(k) for k in (0, 2, 3, 4)] == [None] * 4
    assert found.score(*found.best(1)) == 1
    assert found.score(0, 0, [(1, 2)]) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="unpack"):
        found.score(0, 0, [(2, 3)])
    assert found.between[0].in_words() == (
        "skipping blocks 1 to 1 too loses 0.2 ± 0.05 less than the best head and tail of 1 blocks"
    )


def test_something_must_be_left_to_train():
    for skipped in (-1, 3):
        with pytest.raises(ValueError, match=f"{skipped} of 3 blocks"):
            selection().best(skipped)


# ---------------------------------------------------------------- the file


@settings(max_examples=50, deadline=None)
@given(selections())
def test_what_is_written_is_read(tmp_path_factory, found):
    path = write_selection(found, tmp_path_factory.mktemp("file") / "deep" / NAME)
    assert read_selection(path) == found


def test_runs_between_are_written_and_read(tmp_path):
    found = selection(between=[between()])
    assert read_selection(write_selection(found, tmp_path / NAME)) == found


@pytest.mark.parametrize("model", ["tiny-sana", "tiny-flux"])
def test_the_shipped_selections_are_read(model):
    files = [SAMPLES / model / NAME, *SAMPLES.glob(f"reproduce/selections/{model}*.json")]
    found = [read_selection(file) for file in files]
    assert {one.method for one in found} == {"loss-frozen", "loss-masked", "generation"}
    assert {(one.layers, one.model_hash) for one in found} == {
        (12, open_model(SAMPLES / model).hash)
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head": [0, 1]}, "head has 2 values for 3 blocks"),
        ({"tail": [0.5, 1, 1, 1]}, r"tail\[0\] is 0.5"),
        ({"tail": [0, 1, 1, float("nan")]}, "tail.3"),
        ({"head": [0, 1, 1, float("inf")]}, "head.3"),
        ({"head": [0, "1", 1, 1]}, "head.1"),
        ({"layers": 0}, "layers"),
        ({"layers": True}, "layers"),
        ({"subjects": []}, "no subject"),
        ({"method": "guess"}, "method"),
        ({"extra": 1}, "extra"),
        ({"between": [between(run=(0, 1))]}, "between.0.run.0"),
        ({"between": [between(head=1)]}, r"run \[1, 2\]"),
        ({"between": [between(run=(1, 3))]}, r"run \[1, 3\]"),
        ({"between": [between(), between(gain=0.1)]}, "two splits"),
        ({"between": [between(gain="0.1")]}, "between.0.gain"),
        ({"between": [between(run="12")]}, "between.0.run"),
        ({"between": None}, "between"),
        ({"schema_version": 2}, "schema version 2"),
        ({"schema_version": "1"}, "schema version '1'"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, changes, words):
    path = tmp_path / NAME
    write_document(path, {**selection().model_dump(), **changes})
    with pytest.raises(BadInput, match=words) as caught:
        read_selection(path)
    assert caught.value.remedy


def test_a_changed_number_is_noticed(tmp_path):
    path = write_selection(selection(), tmp_path / NAME)
    path.write_text(path.read_text().replace("0.1", "0.2"))
    with pytest.raises(BadInput, match="damaged"):
        read_selection(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(BadInput, match="selection"):
        read_selection(tmp_path / NAME)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([*selection().model_dump(), "new"]), anything, st.booleans())
def test_any_value_anywhere_is_refused_or_whole(tmp_path_factory, key, value, drop):
    raw = selection().model_dump()
    raw[key] = value
    if drop:
        del raw[key]
    path = tmp_path_factory.mktemp("fuzz") / NAME
    write_document(path, raw)  # with the digest that makes it one of ours
    try:
        found = read_selection(path)
    except BadInput:
        return
    assert len(found.head) == len(found.tail) == found.layers + 1
    assert np.isfinite(found.head + found.tail).all()
    assert [found.best(skipped) for skipped in range(found.layers)]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200) | st.integers(0, 700).map(lambda n: n))
def test_any_bytes_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / NAME
    whole = json.dumps(selection().model_dump()).encode()
    path.write_bytes(whole[: min(content, len(whole) - 1)] if isinstance(content, int) else content)
    with pytest.raises(BadInput):
        read_selection(path)


# ---------------------------------------------------------------- where it lies


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_file(HASH)


def test_the_models_own_selection_goes_before_this_machines(tmp_path, cache):
    assert find_selection(tmp_path, HASH) == (None, "no selection was made for this model")
    ours, its = selection(seconds=1.0), selection(seconds=2.0)
    assert write_selection(ours) == cache
    assert find_selection(tmp_path, HASH) == (ours, str(cache))
    write_selection(its, tmp_path / NAME)
    assert find_selection(tmp_path, HASH) == (its, str(tmp_path / NAME))


def test_a_foreign_or_damaged_selection_is_ignored_and_said_so(tmp_path, cache):
    write_selection(selection(model_hash="f" * 64), tmp_path / NAME)
    found, why = find_selection(tmp_path, HASH)
    assert found is None
    assert "ffffffffffff" in why
    assert HASH[:12] in why
    (tmp_path / NAME).write_text("{")
    found, why = find_selection(tmp_path, HASH)
    assert found is None
    assert str(tmp_path / NAME) in why
    assert "unreadable" in why
    ours = selection()
    write_selection(ours)
    assert find_selection(tmp_path, HASH) == (ours, str(cache))


def test_without_xdg_it_lies_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file("ab") == tmp_path / ".cache" / "edge-dit" / "selection" / "ab.json"


def test_a_selection_in_the_models_folder_does_not_change_the_model(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    before = Model(FAMILY, tmp_path, {}).hash
    write_selection(selection(), tmp_path / NAME)
    assert Model(FAMILY, tmp_path, {}).hash == before


# ---------------------------------------------------------------- measuring

STEPS = 3


@pytest.fixture(scope="module")
def plan(workplace):
    return make_plan(read_job(workplace / "job.toml"))


@pytest.fixture(scope="module")
def model(plan):
    return model_of(plan)


@pytest.fixture(scope="module")
def toys(workplace, plan):
    """Two subjects, the second with a held-out picture."""
    images = read_folder(workplace / "images", "a sks toy", plan.s_max)
    return [Subject("one", images[:1]), Subject("two", images[1:2], images[2:])]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def drawn(plan, toys, work):
    return select_by_generation(plan, toys, work, steps=STEPS, drawn=Drawn(prompts=1, seeds=(4,)))


@torch.no_grad()
def loss_of(model, transformer, image, number, level):
    sigma = (level + 0.5) / LEVELS
    seed = UNSEEN + LEVELS * number + level
    return float(whole_loss(model, transformer, image, sigma, seed))


@pytest.fixture(scope="module")
def tuned(plan, model, toys, tmp_path_factory):
    """The second subject's LoRA in the stock pipeline's own way, and its encoded picture."""
    folder = tmp_path_factory.mktemp("lora")
    pipeline = load_pipeline(plan.model)
    images = encode_whole(plan, model, pipeline, toys[1].images)
    tensors = train_full_lora(plan, model, pipeline, images, STEPS)
    write_adapter_folder(folder, tensors, plan.rank, plan.alpha, base_model=str(plan.model))
    pipeline = load_pipeline(plan.model)
    (seen,) = encode_whole(plan, model, pipeline, toys[1].heldout)
    with adapted(pipeline, folder):
        yield pipeline, seen


def test_generation_measures_the_distance_of_masked_pictures(plan, toys, work, drawn, tuned):
    assert (drawn.method, drawn.embedding) == ("generation", "VAE latents")
    assert drawn.subjects == ["one", "two"]
    assert drawn.prompts == [toys[0].images[0].caption, toys[1].heldout[0].caption]
    assert (drawn.seeds, drawn.draws, drawn.steps, drawn.layers) == ([4], 2, STEPS, 4)
    assert drawn.head[4] == drawn.tail[4]
    assert min(drawn.head[1:] + drawn.tail[1:]) > 1e-5
    alone = select_by_generation(
        plan, toys[1:], work, steps=STEPS, drawn=Drawn(prompts=1, seeds=(4,))
    )
    pipeline, _ = tuned
    family, embed = FAMILY, embedder(None, pipeline)

    def pictures(blocks):
        with text_masked(family, pipeline.transformer, blocks):
            return embed(family.sample(pipeline, toys[1].heldout[0].caption, plan.s_max, [4]))

    for blocks, expected in (([0, 1], alone.head[2]), ([3], alone.tail[1])):
        assert distance(pictures([]), pictures(blocks)) == pytest.approx(expected, abs=1e-5)


def test_masked_loss_is_what_the_mask_adds(plan, model, toys, work, tuned):
    found = select_by_loss(plan, toys[1:], work, frozen=False, steps=STEPS)
    assert (found.method, found.over, found.draws) == ("loss-masked", "held-out images", 8)
    pipeline, seen = tuned

    def loss(blocks):
        with text_masked(FAMILY, pipeline.transformer, blocks):
            return np.mean([loss_of(model, pipeline.transformer, seen, 0, n) for n in range(8)])

    for blocks, value in (([0, 1], found.head[2]), ([3], found.tail[1]), (range(4), found.head[4])):
        assert loss(blocks) - loss([]) == pytest.approx(value, abs=1e-6)
        assert abs(value) > 1e-6


def switch(transformer, numbers, on):
    blocks = list(FAMILY.blocks(transformer).values())
    for number in numbers:
        for module in blocks[number].modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(on)


@torch.no_grad()
def replayed(model, transformer, seen, trained, draw, tail="stored"):
    """The loss of the trainable sub-graph with the base model's residuals, or with a tail that runs
    without LoRA.
    """
    family, objective = model.family, model.objective
    blocks = list(family.blocks(transformer).items())
    sigma, seed = (draw % 8 + 0.5) / 8, UNSEEN + draw
    noise = torch.randn(seen.clean.shape, generator=torch.Generator().manual_seed(seed))
    noised = objective.noised(seen.clean, noise, sigma)
    inputs = family.inputs(transformer, noised, objective.timestep(sigma), seen.prompt, seen.grid)
    entry, cond = family.begin(transformer, inputs)
    switch(transformer, range(4), False)
    states = [entry]
    for block in blocks:
        states.append(family.run_block(*block, states[-1], cond, seen.grid))
    switch(transformer, range(4), True)
    residual = states[4].image - states[trained[-1] + 1].image
    inner = {
        first: difference(states[behind], states[first])
        for behind, first in runs_between(trained).items()
    }
    sub = TrainableSubgraph(transformer, family, trained, seen.grid, tail)
    stored = residual if tail == "stored" else None
    batch = as_batch(
        states[trained[0]], stored, cond, objective.target(seen.clean, noise), inner=inner
    )
    switch(transformer, range(trained[-1] + 1, 4), False)
    loss = float(sub(batch))
    switch(transformer, range(4), True)
    return loss


def test_a_run_between_is_measured_against_the_best_head_and_tail(plan, model, toys, work, tuned):
    """With the trainable sub-graph, of both pictures that are measured."""
    unseen = [toys[1].heldout[0], toys[0].images[0]]
    toy = replace(toys[1], heldout=unseen)
    found = select_by_loss(plan, [toy], work, steps=STEPS)
    assert [split.skipped for split in found.between] == [1, 2]
    pipeline, _ = tuned
    images = encode_whole(plan, model, load_pipeline(plan.model), unseen)
    for split in found.between:

        def lost(head, tail, *inner):
            trained = trained_blocks(4, head, tail, inner)
            draws = [
                replayed(model, pipeline.transformer, image, trained, 8 * number + level)
                for number, image in enumerate(images)
                for level in range(8)
            ]
            return np.reshape(draws, (2, 8)).mean(axis=1)

        ends = lost(*found.best(split.skipped))
        gains = ends - lost(split.head_skip, split.tail_skip, split.run)
        assert np.abs(gains).min() > 1e-6
        assert split.gain == pytest.approx(gains.mean(), abs=2e-7)
        assert split.error == pytest.approx(gains.std(ddof=1) / 2**0.5, abs=2e-7)


def test_only_runs_that_leave_the_same_kinds_of_blocks_are_candidates():
    found = selection((0, 1, 1, 1, 1, 1, 1), (0, 5, 5, 5, 5, 5, 5))
    runs = {run: 0.0 for run in inner_runs.runs_to_measure(6)}
    mixed = inner_runs.candidates(found, runs, [int, int, int, str, str, str])
    alike = inner_runs.candidates(found, runs, [int] * 6)
    for split in mixed:
        blocks = [n for n in range(6) if n not in trained_blocks(6, *found.best(split.skipped))]
        kinds = sorted("int" if n < 3 else "str" for n in blocks)
        own = trained_blocks(6, split.head_skip, split.tail_skip, [split.run])
        assert sorted("int" if n < 3 else "str" for n in range(6) if n not in own) == kinds
    assert len(mixed) < len(alike)
    assert {split.skipped for split in alike} == {1, 2, 3, 4}
    assert all(len([s for s in alike if s.skipped == k]) <= inner_runs.SHORTLIST for k in range(6))


def test_frozen_loss_is_what_skipping_loses(plan, model, toys, work, tuned):
    """Against the stock forward with LoRA switched off in the head's blocks, and against the
    trainable sub-graph with the base model's tail residual.
    """
    found = select_by_loss(plan, toys[1:], work, steps=STEPS)
    pipeline, seen = tuned
    transformer = pipeline.transformer

    def headless(n):
        switch(transformer, range(n), False)
        found = np.mean([loss_of(model, transformer, seen, 0, level) for level in range(8)])
        switch(transformer, range(n), True)
        return found

    whole = headless(0)
    for n in range(1, 4):
        assert headless(n) - whole == pytest.approx(found.head[n], abs=1e-6)
        draws = range(8)
        tail = np.mean([replayed(model, transformer, seen, range(4 - n), d) for d in draws])
        assert tail - whole == pytest.approx(found.tail[n], abs=1e-6)
    assert headless(4) - whole == pytest.approx(found.head[4], abs=1e-6)
    assert found.head[4] == pytest.approx(found.tail[4], abs=1e-6)
    assert found.between == []  # of one picture there is no standard error
    assert abs(found.head[4]) > 1e-5  # tuning did something


def test_losses_say_which_pictures_they_are_of(plan, toys, work):
    found = select_by_loss(plan, toys, work, steps=STEPS)
    assert found.over == "held-out and training images"
    assert (found.embedding, found.prompts, found.seeds, found.draws) == ("", [], [], 16)
    one, two = (select_by_loss(plan, [toy], work, steps=STEPS) for toy in toys)
    assert found.head == pytest.approx(np.mean([one.head, two.head], axis=0).tolist())
    assert found.tail == pytest.approx(np.mean([one.tail, two.tail], axis=0).tolist())


@pytest.mark.parametrize("after", ["tuning", "measuring"])
def test_a_stopped_selection_goes_on(plan, toys, drawn, tmp_path, monkeypatch, after):
    calls = []

    def stopped(*arguments, stock=subjects.train_full_lora):
        calls.append("tuned")
        if len(calls) == 2 and after == "measuring":
            raise KeyboardInterrupt
        return stock(*arguments)

    def masked(*arguments, stock=selectors.text_masked):
        if after == "tuning" and len(calls) == 2:
            raise KeyboardInterrupt
        return stock(*arguments)

    def select():
        return select_by_generation(
            plan, toys, tmp_path, steps=STEPS, drawn=Drawn(prompts=1, seeds=(4,))
        )

    monkeypatch.setattr(subjects, "train_full_lora", stopped)
    monkeypatch.setattr(selectors, "text_masked", masked)
    with pytest.raises(KeyboardInterrupt):
        select()
    assert len(list(tmp_path.glob("generation-*.json"))) == 1
    calls.append("again")
    found = select()
    # The first subject is not tuned again, nor is the second where its tuning was finished.
    assert calls[3:] == ([] if after == "tuning" else ["tuned"])
    assert (found.head, found.tail) == (drawn.head, drawn.tail)
    assert select() == found  # all of it from the work folder, the seconds too


def test_what_is_damaged_in_the_work_folder_is_measured_again(plan, toys, tmp_path):
    first = select_by_loss(plan, toys[:1], tmp_path, steps=STEPS)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    second = select_by_loss(plan, toys[:1], tmp_path, steps=STEPS)
    assert (second.head, second.tail) == (first.head, first.tail)


def test_what_decides_the_numbers_decides_what_is_kept(plan, toys, tmp_path):
    def kept(*arguments, **options):
        select_by_loss(*arguments, tmp_path, **{"steps": STEPS, **options})
        return len(list(tmp_path.glob("*.json"))), len(list(tmp_path.glob("*.safetensors")))

    # Losses with a stored tail, and with one that runs.
    assert kept(plan, toys[:1]) == (2, 1)
    assert kept(plan.model_copy(update={"head_skip": 0, "targets": []}), toys[:1]) == (2, 1)
    assert kept(plan, toys[:1], steps=2) == (4, 2)
    assert kept(plan.model_copy(update={"seed": 8}), toys[:1]) == (6, 3)
    unseen = replace(toys[0], heldout=toys[1].images)
    assert kept(plan, [unseen]) == (8, 3)


def test_no_subject_is_refused(plan, tmp_path):
    with pytest.raises(BadInput, match="at least one"):
        select_by_loss(plan, [], tmp_path)


FAMILIES = ["sana-sprint", "flux-dev", "sd3.5-medium", "pixart-sigma", "qwen-image"]
JOB = """
[model]
path = "model"
[data]
images = "images"
prompt = "a sks toy"
[train]
resolution = 32
patch = 16
rank = 2
steps = 2
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_measured(name, workplace, tmp_path):
    pipelines.write_pipeline(name, tmp_path / "model")
    (tmp_path / "images").symlink_to(workplace / "images")
    (tmp_path / "job.toml").write_text(JOB)
    made = make_plan(read_job(tmp_path / "job.toml"))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    picture = Captioned("toy.png", "0" * 64, ("a sks toy",), (32, 32), False, lambda: pixels)
    toy = Subject("toy", [picture])
    found = select_by_generation(made, [toy], tmp_path / "work", drawn=Drawn(prompts=1, seeds=(1,)))
    assert min(found.head[1:] + found.tail[1:]) > 1e-9
    assert max(found.head + found.tail) < 2
    masked = select_by_loss(made, [toy], tmp_path / "work", frozen=False)
    assert all(abs(value) > 1e-9 for value in masked.head[1:] + masked.tail[1:])
    frozen = select_by_loss(made, [toy], tmp_path / "work")
    assert frozen.head[4] == pytest.approx(frozen.tail[4], abs=1e-6)
    assert abs(frozen.head[4]) > 1e-7


def test_a_tail_that_runs_is_measured_with_the_trainable_sub_graph(plan, model, toys, work, tuned):
    toy = toys[1]
    found = select_by_loss(plan, [toy], work, steps=STEPS)
    assert len(found.tail_run) == 5
    assert found.tail_run[0] == 0
    assert found.tail_run[4] == pytest.approx(found.tail[4], abs=1e-6)  # nothing tuned is left
    pipeline, _ = tuned
    pictures = toy.heldout or toy.images
    images = encode_whole(plan, model, load_pipeline(plan.model), pictures)

    def mean(trained, tail):
        return np.mean(
            [
                replayed(model, pipeline.transformer, image, trained, 8 * number + level, tail)
                for number, image in enumerate(images)
                for level in range(8)
            ]
        )

    whole = mean(range(4), "stored")
    for skipped in (1, 2):
        run = mean(range(4 - skipped), "through") - whole
        assert found.tail_run[skipped] == pytest.approx(run, abs=1e-6)
        assert abs(run - found.tail[skipped]) > 1e-6
    other = found.for_tail("through")
    assert (other.tail, other.between) == (found.tail_run, [])
    assert found.for_tail("stored") == found
