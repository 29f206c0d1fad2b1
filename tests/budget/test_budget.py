"""The budget: sizes in words, the search against brute force, and what is said about it."""

import itertools
import json
import re
from dataclasses import replace
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_dit.app.planner import plan_job
from edge_dit.app.public_plan import PublicRequest, best_within
from edge_dit.budget.footprint import REFERENCE, Footprints
from edge_dit.budget.limits import Limits
from edge_dit.budget.quality import FRESH_SHARE, THROUGH_SHARE, quality
from edge_dit.budget.search import (
    MARGIN,
    TIME_MARGIN,
    Bounds,
    Option,
    Space,
    bounds_of,
    choose,
    plan_within,
    space_of,
    variants_of,
)
from edge_dit.cli import main
from edge_dit.contract.names import FRESH, STORED, TAILS, THROUGH
from edge_dit.contract.targets import VARIANTS, TargetVariant
from edge_dit.errors import BadInput, ManyFaults
from edge_dit.models.families import family_of
from edge_dit.models.public_configs import public_config
from edge_dit.planning.job import bytes_of, read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import read_plan
from edge_dit.planning.selection import Between, write_selection
from edge_dit.planning.split import SplitRequest
from edge_dit.text import seconds_of, size
from selections import between, selection
from tiny import write_job

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("3GiB", 3 * GIB), ("200 MiB", 200 * 2**20), ("1.5gb", 1_500_000_000), ("10KB", 10_000)],
)
def test_sizes(text, bytes_):
    assert bytes_of(text) == bytes_


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "GiB",
        "0GiB",
        "-1GiB",
        "3 GiB RAM",
        "1e3GiB",
        "nanGiB",
        "3gigs",
        "9" * 99,
        "3Gbit",
        "0.0001KB",
        "9" * 400 + "GiB",
        "\x1c3GiB",
    ],
)
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="3GiB"):
        bytes_of(text)


def test_times():
    assert seconds_of("5s") == 5
    assert seconds_of("800 ms") == pytest.approx(0.8)
    with pytest.raises(ValueError, match="800ms"):
        seconds_of("5 minutes")


@given(st.floats(2**20, 2**49))
def test_a_size_in_words_is_read_back(number):
    assert bytes_of(size(number)) == pytest.approx(number, rel=0.006)


@pytest.fixture(scope="module")
def space() -> Space:
    """PixArt's shapes with six blocks, and a selection in which the front matters less."""
    public = public_config("pixart-sigma-xl")
    config = {**public.config, "num_layers": 6}
    bounds = Bounds(
        s_min=512, s_max=1024, multiple=public.multiple, text_tokens=300, rank=16, draws=64
    )
    measured = selection(
        head=(0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0),
        tail=(0, 0.15, 0.35, 0.6, 0.8, 0.9, 1.0),
        between=[between(head=1, run=(2, 4), gain=0.05, error=0.01), between(gain=0.01)],
    )
    return space_of(family_of(public.family), config, bounds, REFERENCE, VARIANTS, measured)


def brute_force(space: Space, limits: Limits) -> float | None:
    """Best score within the limits by a search that shares nothing with `choose` but the terms;
    None where nothing fits.
    """
    best = None
    measured, factors = space.selection, quality().factors
    # Of what a stored tail costs, through loses a share, and fresh lies between.
    own = {
        STORED: 1,
        THROUGH: THROUGH_SHARE,
        FRESH: FRESH_SHARE * (1 - THROUGH_SHARE) + THROUGH_SHARE,
    }
    splits = [
        (
            range(n, 6 - m),
            (measured.head[n] + own[tail] * measured.tail[m]) / measured.head[-1],
            tail,
        )
        for n in range(6)
        for m in range(6 - n)
        for tail in (TAILS if m else (STORED,))
    ]
    # k = 3: head 2 and tail 1 cost 0.2 + 0.15, the run gains 0.05. The other gain is within two
    # errors.
    splits.append(((1, 4, 5), 0.3, STORED))
    choices = itertools.product(splits, (512, 384, 256), (16, 8, 4), VARIANTS)
    for (trained, lost, tail), s_min, rank, variant in choices:
        if variant.target == "ort-training" and tail == FRESH:
            continue
        footprint = space.patches[s_min].of(trained, rank, variant, tail)
        if footprint.ram * MARGIN > limits.ram or footprint.seconds * TIME_MARGIN > limits.seconds:
            continue
        if (footprint.bundle + 64 * footprint.draw) * MARGIN > limits.flash:
            continue
        score = -factors.skipped * lost - factors.crop * (1024 - s_min) / 1024
        score -= factors.rank * np.log2(16 / rank)
        score -= {"float32": 0, "float16": 0.001, "int8": 0.005, "int4": 0.01}[variant.dtype]
        best = score if best is None else max(best, score)
    return best


def test_on_random_budgets_nothing_better_was_missed(space):
    rng = np.random.default_rng(0)
    some_fit = 0
    for _ in range(20):
        limits = Limits(
            ram=float(np.exp(rng.uniform(np.log(0.1 * GIB), np.log(4 * GIB)))),
            flash=float(rng.choice([inf, GIB, 0.2 * GIB])),
            seconds=float(rng.choice([inf, 8.0, 2.0])),
        )
        best = brute_force(space, limits)
        if best is None:
            with pytest.raises(BadInput, match="no plan fits"):
                choose(space, limits)
            continue
        some_fit += 1
        choice = choose(space, limits)
        assert choice.best.score == pytest.approx(best, rel=1e-9)
        assert choice.best.footprint.ram * MARGIN <= limits.ram
    assert 5 < some_fit < 20


def test_a_run_between_is_chosen_where_it_was_measured_to_be_better(space):
    """Where three blocks fit in one way of training."""
    (patch, *_), onnx = space.patches, TargetVariant("onnx")
    kept = replace(space.bounds, tail=STORED)  # runs between were measured with a stored tail
    one = replace(space, variants=[onnx], patches={patch: space.patches[patch]}, bounds=kept)
    option, *lower_ranks = (option for option in one.options() if option.inner_skips)
    assert [other.rank for other in lower_ranks] == [8, 4]
    assert option == Option(1, 0, patch, 16, onnx, ((2, 4),))
    choice = choose(one, Limits(ram=one.candidate(option).footprint.ram * MARGIN))
    assert choice.best.option == option
    words = "\n".join(choice.in_words())
    assert "skip 1 before and 0 after, [2, 4) between" in words
    assert "1+0+[2, 4)" in words


def test_more_memory_never_gives_a_worse_plan(space):
    scores = [choose(space, Limits(ram=g * GIB)).best.score for g in (0.5, 1, 2, 4, inf)]
    assert scores == sorted(scores)
    assert scores[0] < scores[-1]


def chosen(space: Space, gib: float) -> tuple[int, int]:
    """Number of skipped blocks and side of the patch of the best plan."""
    option = choose(space, Limits(ram=gib * GIB)).best.option
    return option.head_skip + option.tail_skip, option.s_min


def test_blocks_that_matter_little_are_skipped_before_the_patch_shrinks(space):
    """By the paper's ablation half of six blocks cost less (0.022) than a quarter of the patch
    (0.0525); in the fused layout depth takes memory.
    """
    kept = replace(space.bounds, tail=STORED)  # as the paper has it
    fused = replace(space, selection=None, variants=[TargetVariant("onnx")], bounds=kept)
    assert [chosen(fused, gib) for gib in (4, 2.2, 1.6)] == [(0, 512), (1, 512), (3, 512)]
    assert [chosen(fused, gib) for gib in (1.1, 0.7)] == [(2, 384), (2, 256)]


def test_the_patch_shrinks_before_blocks_are_skipped_that_matter_much(space):
    """With each block the selection loses 0.7 of all: more than a quarter of the patch."""
    lost = (0, 0.7, 1.4, 2.1, 2.8, 3.5, 1.0)
    assert quality().factors.skipped * lost[1] > quality().factors.crop * 0.25
    steep = selection(head=lost, tail=lost)
    kept = replace(space.bounds, tail=STORED)
    fused = replace(space, variants=[TargetVariant("onnx")], selection=steep, bounds=kept)
    assert [chosen(fused, gib) for gib in (4, 2, 1)] == [(0, 512), (0, 384), (0, 256)]
    skipped, side = chosen(fused, 0.6)
    assert skipped > 0
    assert side == 256


def test_the_smallest_budget_that_some_plan_fits_has_a_plan(space):
    need = min(MARGIN * candidate.footprint.ram for candidate in space.candidates())
    smallest = choose(space, Limits(ram=need))
    assert MARGIN * smallest.best.footprint.ram == need
    assert smallest.best.option.s_min == 256
    with pytest.raises(BadInput, match="no plan fits"):
        choose(space, Limits(ram=0.999 * need))


def test_where_a_selection_says_that_all_is_lost_patch_and_rank_still_count(space):
    """Head and tail together lose 2.5 times what the whole model learns."""
    steep = selection(head=(0, 1, 1.2, 1.3, 1.4, 1.5, 1), tail=(0, 1, 1.2, 1.3, 1.4, 1.5, 1))
    bounds = replace(space.bounds, head_skip=3, tail_skip=2)
    option = choose(replace(space, bounds=bounds, selection=steep), Limits()).best.option
    assert (option.s_min, option.rank, option.variant.dtype) == (512, 16, "float32")


@given(st.floats(0.3, 4), st.booleans())
def test_no_share_is_printed(space, gib, measured):
    chosen = replace(space, selection=space.selection if measured else None)
    words = "\n".join(choose(chosen, Limits(ram=gib * GIB)).in_words())
    assert "%" not in words
    assert ("measured on this model" in words) == measured
    assert "weights (a guess on the safe side)" in words


def test_facts_of_a_public_checkpoint_hold_no_score():
    facts, lines = best_within(PublicRequest("pixart-sigma-xl"), Limits(ram=2 * GIB), REFERENCE)
    assert facts["fitting"] < facts["compared"]
    assert f"best of {facts['compared']:,} plans within 2 GiB of memory" in lines[1]
    assert not facts.keys() & {"quality", "score"}
    assert "%" not in json.dumps(facts)


def test_what_was_given_up_and_what_more_would_buy(space):
    tight = choose(space, Limits(ram=0.4 * GIB))
    words = "\n".join(tight.in_words())
    assert "given up for it:" in words
    assert re.search(r"1 GiB more would allow: .* -> ", words)
    ample = choose(space, Limits(ram=1000 * GIB))
    assert ample.more is None
    assert "given up" not in "\n".join(ample.in_words())


def test_nothing_fits_says_what_would(space):
    with pytest.raises(BadInput) as caught:
        choose(space, Limits(ram=2**20))
    remedy = caught.value.remedy
    amount = remedy.split("give ")[1].split(" of ram")[0]
    assert choose(space, Limits(ram=bytes_of(amount) * 1.01)).best
    with pytest.raises(BadInput, match="raise several limits together"):
        choose(space, Limits(ram=2**20, flash=2**20))


def test_given_ends_are_kept_to(space):
    fixed = replace(space, bounds=replace(space.bounds, head_skip=2, tail_skip=1))
    option = choose(fixed, Limits()).best.option
    assert (option.head_skip, option.tail_skip) == (2, 1)


def test_a_given_tail_is_kept_to_and_a_measured_one_counts(space):
    fixed = replace(space.bounds, head_skip=1, tail_skip=2)
    for tail in TAILS:
        given = replace(space, bounds=replace(fixed, tail=tail))
        assert choose(given, Limits()).best.option.tail == tail
    assert choose(replace(space, bounds=fixed), Limits()).best.option.tail == THROUGH
    # It was measured that this model does better with the base model's residual.
    worse = [2 * cost for cost in space.selection.tail]
    other = replace(space, selection=space.selection.model_copy(update={"tail_run": worse}))
    assert choose(replace(other, bounds=fixed), Limits()).best.option.tail == STORED


def test_a_budget_in_time_or_flash_decides_the_tail(space):
    fixed = replace(space, bounds=replace(space.bounds, head_skip=1, tail_skip=2))
    of = {tail: candidate_of(fixed, tail) for tail in TAILS}
    seconds = {tail: candidate.footprint.seconds for tail, candidate in of.items()}
    assert seconds[STORED] < seconds[FRESH] < seconds[THROUGH]
    assert of[STORED].footprint.bundle < of[FRESH].footprint.bundle
    assert of[STORED].footprint.draw > of[FRESH].footprint.draw == of[THROUGH].footprint.draw
    way = replace(fixed, variants=[TargetVariant("onnx", "streamed")])
    way = replace(way, patches={512: way.patches[512]})
    way = replace(way, bounds=replace(way.bounds, rank=1))
    for tail in TAILS:
        limits = Limits(seconds=TIME_MARGIN * candidate_of(way, tail).footprint.seconds * 1.001)
        assert choose(way, limits).best.option.tail == tail


def candidate_of(space, tail):
    """With two blocks skipped after the trained ones, streamed."""
    way = TargetVariant("onnx", "streamed")
    return space.candidate(Option(1, 2, 512, space.bounds.rank, way, (), tail))


def test_slow_storage_counts_in_a_budget_of_memory_and_time(space):
    """Streamed, in memory that holds a block and little more."""
    ends = replace(space.bounds, head_skip=1, tail_skip=0)
    ways = [TargetVariant("onnx", "streamed"), TargetVariant("onnx", "streamed", "int8")]
    small = {256: space.patches[256].shapes}

    def on(rate: float | None) -> Space:
        profile = replace(REFERENCE, read=rate)
        patches = {side: Footprints(shapes, profile) for side, shapes in small.items()}
        return replace(space, bounds=ends, variants=ways, patches=patches)

    wide = Option(1, 0, 256, 16, ways[0])
    ram = MARGIN * on(None).candidate(wide).footprint.ram
    in_time = Limits(ram=ram, seconds=2 * TIME_MARGIN * on(None).candidate(wide).footprint.seconds)
    assert choose(on(None), in_time).best.option == wide
    fast = choose(on(10e9), in_time).best
    assert fast.option == wide
    assert fast.footprint.read > 0
    assert f"in which {size(fast.footprint.read)} of weights are read" in fast.in_words()
    slow = choose(on(100e6), in_time).best
    assert slow.option.variant == ways[1]  # a quarter of the bytes, which fit
    assert slow.footprint.read < fast.footprint.read
    assert "are read" not in choose(on(100e6), Limits(seconds=1e6)).best.in_words()


def test_without_a_selection_the_papers_ablation_speaks(space):
    unknown = replace(space, selection=None)
    assert unknown.skip_penalty(3, 0) == pytest.approx(1 - 0.6651 / 0.7324, abs=0.002)  # Table 2
    assert unknown.skip_penalty(0, 3) == pytest.approx(1 - 0.4808 / 0.7324, abs=0.002)
    assert unknown.skip_penalty(0, 0) == 0


def test_variants_of_targets():
    assert len(variants_of(["onnx"])) == 6
    assert variants_of(["onnx:streamed", "onnx"])[0] == TargetVariant("onnx", "streamed")
    with pytest.raises(BadInput, match="onnx:streamed:int8"):
        variants_of(["coreml"])
    assert {str(variant) for variant in variants_of(["onnx", "ort-training"], "int8")} == {
        "onnx:fused:int8:int8",
        "onnx:recompute:int8:int8",
        "onnx:streamed:int8:int8",
        "ort-training",  # it cannot
    }


# ---------------------------------------------------------------- a job under a budget


def test_a_plan_within_a_budget_can_be_walked(workplace):
    whole = make_plan(read_job(workplace / "job.toml"), SplitRequest(skip_ratio=0.0))
    limits = Limits(ram=160 * 2**20)
    ways = variants_of(["onnx"])
    plan, choice = plan_within(whole, bounds_of(whole), limits, REFERENCE, ways)
    assert plan.targets == ["onnx"]
    assert plan.layout == choice.best.option.variant.layout
    assert plan.alpha / plan.rank == whole.alpha / whole.rank
    assert plan.s_min <= whole.s_min
    assert choice.best.footprint.ram * MARGIN <= limits.ram


def test_a_budget_in_the_job_file(workplace):
    path = write_job(workplace, ("head_skip = 1\ntail_skip = 1", 'ram = "160MiB"'))
    planned = plan_job(read_job(path), profile=REFERENCE)
    assert planned.choice is not None
    assert planned.limits == Limits(ram=160 * 2**20)
    path = write_job(workplace, ("head_skip = 1", 'ram = "160MiB"'))
    assert plan_job(read_job(path), profile=REFERENCE).plan.tail_skip == 1
    # A ratio by hand overrides it.
    half = SplitRequest(skip_ratio=0.5)
    assert plan_job(read_job(path), half, profile=REFERENCE).choice is None


def test_a_budget_beside_a_ratio(workplace):
    path = write_job(workplace, ("head_skip = 1", 'ram = "160MiB"\nskip_ratio = 0.5'))
    with pytest.raises(BadInput, match=r"plan\.skip_ratio beside plan\.ram"):
        read_job(path)
    job = read_job(workplace / "job.toml")
    with pytest.raises(BadInput, match="--skip-ratio"):
        plan_job(job, SplitRequest(skip_ratio=0.5), limits=Limits(ram=GIB))


def test_what_is_no_budget_in_a_job_file(workplace):
    path = write_job(
        workplace, ("head_skip = 1", 'ram = "much"'), ("tail_skip = 1", 'step_time = "soon"')
    )
    with pytest.raises(ManyFaults) as caught:
        read_job(path)
    assert "plan.ram = 'much'" in str(caught.value)
    assert "a time such as 5s" in str(caught.value)


def test_a_selection_decides_where_only_a_ratio_is_given(workplace, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = write_job(workplace, ("head_skip = 1\ntail_skip = 1", "skip_ratio = 0.5"))
    plain = make_plan(read_job(path))
    assert (plain.head_skip, plain.tail_skip) == (2, 0)
    found = selection(
        head=(0, 0.9, 0.9, 0.9, 1.0),
        tail=(0, 0.1, 0.2, 0.3, 1.0),
        model_hash=plain.model_hash,
        layers=4,
    )
    write_selection(found)
    planned = plan_job(read_job(path), profile=REFERENCE)
    assert (planned.plan.head_skip, planned.plan.tail_skip) == (0, 2)
    assert planned.in_words()[0].startswith("blocks by ")
    # A run between that was measured to be better goes before the best ends, a given one stands.
    better = Between(**between(head=1, run=(2, 3)))
    write_selection(found.model_copy(update={"between": [better]}))
    planned = plan_job(read_job(path), profile=REFERENCE)
    assert planned.plan.trained == [1, 3]
    assert planned.in_words()[1] == better.in_words()
    given = write_job(
        workplace, ("head_skip = 1\ntail_skip = 1", "skip_ratio = 0.5\ninner_skips = [[1, 2]]")
    )
    with pytest.raises(BadInput, match="inner_skips"):  # best of two are the last two
        make_plan(read_job(given))
    assert make_plan(read_job(path), SplitRequest(head_skip=1)).inner_skips == []
    # Ends given by hand stand.
    by_hand = make_plan(read_job(path), SplitRequest(head_skip=1, tail_skip=1))
    assert (by_hand.head_skip, by_hand.tail_skip) == (1, 1)


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["edge-dit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        return stopped.value.code, printed.out, printed.err

    return run


def test_the_command_line(run, workplace, tmp_path):
    out, page = tmp_path / "plan.json", tmp_path / "plan.html"
    job = workplace / "job.toml"
    code, said, err = run(
        "plan", job, "--ram", "160MiB", "--target", "onnx", "-o", out, "--report", page
    )
    assert code == 0, err
    assert "given up for it" in said or "best of" in said
    assert read_plan(out).layout in ("fused", "recompute", "streamed")
    assert "160 MiB" in page.read_text()
    code, said, _ = run("plan", job, "--ram", "160MiB", "--json", "-o", out)
    assert code == 0
    assert json.loads(said)["reasons"]
    code, said, err = run("cost", "pixart-sigma-xl", "--ram", "2GiB")
    assert code == 0, err
    assert "28 blocks" in said


@pytest.fixture
def in_int8(workplace):
    return write_job(workplace, ("[export]", '[export]\nweights = "int8"\ncompute = "int8"'))


def test_a_budget_keeps_to_the_jobs_int8_products(run, in_int8, tmp_path):
    out = tmp_path / "plan.json"
    code, said, err = run("plan", in_int8, "--ram", "200MiB", "-o", out)
    assert code == 0, err
    plan = read_plan(out)
    assert (plan.compute, plan.weights) == ("int8", "int8")
    assert f"{plan.targets[0]}:{plan.layout}:int8:int8, skip" in said
    streamed = "--target", "onnx:streamed"
    code, said, err = run("plan", in_int8, "--ram", "200MiB", *streamed, "-o", out)
    assert code == 0, err
    assert "onnx:streamed:int8:int8, skip" in said
    code, _, err = run("plan", in_int8, "--ram", "200MiB", "--target", "ort-training")
    assert code == 2
    assert "export.compute: int8, with a budget for ort-training" in err


def test_a_budget_does_not_compute_in_int8_of_its_own_accord(workplace):
    job = read_job(workplace / "job.toml")
    planned = plan_job(job, limits=Limits(), targets=["onnx"], profile=REFERENCE)
    assert planned.plan.compute == "float32"
    assert {v.compute for v in variants_of(["onnx", "executorch"])} == {"float32"}


def test_what_int8_products_take_is_said_without_a_budget(in_int8):
    planned = plan_job(read_job(in_int8), targets=["onnx", "ort-training"], profile=REFERENCE)
    assert list(planned.footprints) == [
        "onnx:fused:int8:int8",
        "onnx:streamed:int8:int8",
        "ort-training",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ram", "lots"), "3GiB"),
        (("--step-time", "5"), "800ms"),
        (("--ram", "1MiB"), "no plan fits"),
        (("--ram", "1GiB", "--skip-ratio", "0.5"), "--skip-ratio"),
        (("--ram", "1GiB", "--target", "coreml"), "coreml"),
        (("--ram", "1GiB", "--head-skip", "3"), "no block to train"),
        (("--profile", "nowhere.json"), "nowhere.json"),
        (("--subjects", "."), "edge-dit select JOB --subjects"),
        (("--select", "loss"), "edge-dit select JOB --method"),
        (("--config", "sana-0.6b"), "edge-dit cost CONFIG"),
        (("--patch", "64"), "edge-dit cost CONFIG --patch"),
    ],
)
def test_bad_input_leaves_no_plan(run, workplace, tmp_path, arguments, words):
    out = tmp_path / "plan.json"
    code, _, err = run("plan", workplace / "job.toml", "-o", out, *arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "guess"), "generation or loss"),
        (("--method", "loss", "--embedding", "x"), "--embedding"),
        (("--method", "loss", "--subjects", "nowhere"), "no such folder"),
    ],
)
def test_bad_input_selects_nothing(run, workplace, arguments, words):
    code, _, err = run("select", workplace / "job.toml", *arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere-1b",), "flux.1-dev"),
        (("sana-0.6b", "--patch", "100"), "96 or 128"),
        (("sana-0.6b", "--head-skip", "20", "--tail-skip", "8"), "no block to train"),
        (("sana-0.6b", "--skip-ratio", "-0.5"), "[0, 1)"),
        (("sana-0.6b", "--ram", "1MiB"), "no plan fits"),
        (("sana-0.6b", "--ram", "1GiB", "--skip-ratio", "0.5"), "together with a budget"),
        (("sana-0.6b", "--report", "x.html"), "No such option"),
    ],
)
def test_bad_input_costs_nothing(run, arguments, words):
    code, out, err = run("cost", *arguments)
    assert code == 2
    assert words in err
    assert not out
