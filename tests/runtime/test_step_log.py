"""The log of a run, its page and its events."""

import csv
import re
import shutil
from html.parser import HTMLParser
from math import isfinite, isnan, nan
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_dit.contract.bank import Bank
from edge_dit.contract.bundle import open_bundle
from edge_dit.errors import BadInput
from edge_dit_runtime.page.chart import Chart, Curve, drawn, ticks
from edge_dit_runtime.page.previews import MOST, chosen
from edge_dit_runtime.page.run_page import PAGE, duration, run_page
from edge_dit_runtime.page.watch import Watch
from edge_dit_runtime.run_folder import SETTINGS, RunFolder
from edge_dit_runtime.session import open_session
from edge_dit_runtime.step_log import (
    BINS,
    STEPS,
    WINDOW,
    Step,
    StepLog,
    by_level,
    norm,
    read_log,
    smoothed,
)
from edge_dit_runtime.training import train
from run_folders import RUN, SKIPPED, made_log, timeless, write_run

LENGTH = 12


def after(steps: int):
    """Stops a run after some steps."""
    return lambda done, _loss: done == steps


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def whole(road, tmp_path_factory) -> Path:
    """A run that never stopped."""
    folder = tmp_path_factory.mktemp("log") / "whole"
    train(road.bundle, road.bank, folder, target="onnx", steps=LENGTH)
    return folder


# ---------------------------------------------------------------- what is logged


def test_every_step_has_its_rate_norm_and_time(road, whole):
    bundle = open_bundle(road.bundle)
    bank = Bank(road.bank, bundle.manifest.plan_hash)
    session = open_session(bundle, "onnx", "fused")
    log = read_log(whole)
    assert len(log) == LENGTH
    for step in log.since(0):
        loss = session.backward(bank[step.draw])
        gradients = np.concatenate([g.ravel() for g in session.gradients().values()])
        session.lr = step.lr
        session.update()
        assert step.loss == loss
        assert step.sigma == bank.draw(step.draw).sigma
        assert step.grad_norm == pytest.approx(float(np.linalg.norm(gradients)), rel=1e-6)
        assert step.seconds > 0
    # Replayed with the logged rates, the adapter is that of the run.
    for name, value in RunFolder(whole).adapter()[0].items():
        np.testing.assert_array_equal(session.adapter()[name], value)
    assert log.lrs[0] == bundle.manifest.optimizer.lr > log.lrs[-1] > 0


def killed_at_seven(road, run):
    """Train into ``run`` until the process would be killed at its seventh step."""

    def die(done, _loss):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(road.bundle, road.bank, run, target="onnx", steps=LENGTH, on_step=die)


def test_killed_and_resumed_it_is_as_if_it_never_stopped(road, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("edge_dit_runtime.training.SAVE_EVERY", 4)
    run = tmp_path / "run"
    killed_at_seven(road, run)
    assert "Stopped: 7 of 12 steps" in (run / PAGE).read_text()
    assert len(read_log(run)) == 4
    train(road.bundle, road.bank, run, target="onnx", resume=True)
    assert timeless(listing(run)).keys() >= {STEPS, "loss.csv", "state.safetensors", "loss.png"}
    assert timeless(listing(run)) == timeless(listing(whole))


@pytest.mark.parametrize("damage", ["lost", "nonsense", "short"])
def test_a_run_whose_steps_are_not_known_goes_on(road, whole, tmp_path, damage):
    """As a run of an older version, or one that another runtime took a part of."""
    run, path = tmp_path / "run", tmp_path / "run" / STEPS
    train(road.bundle, road.bank, run, target="onnx", steps=LENGTH, on_step=after(5))
    for name in (PAGE, SETTINGS):
        (run / name).unlink()
    text = path.read_text()
    path.unlink()
    if damage != "lost":
        path.write_text('\0"nonsense' if damage == "nonsense" else text[: text.index("\n3,")])
    known = 3 if damage == "short" else 0
    train(road.bundle, road.bank, run, target="onnx", resume=True)
    log, wanted = read_log(run), read_log(whole)
    assert log.losses == wanted.losses
    unknown = [isnan(value) for value in log.grad_norms]
    assert unknown == [known <= step < 5 for step in range(LENGTH)]
    assert log.grad_norms[5:] == wanted.grad_norms[5:]
    assert (run / PAGE).is_file()


def test_a_page_that_cannot_be_written_stops_no_run(road, whole, tmp_path, capsys):
    run = tmp_path / "run"
    train(road.bundle, road.bank, run, target="onnx", steps=LENGTH, on_step=after(3))
    (run / PAGE).unlink()
    (run / PAGE).mkdir()
    train(road.bundle, road.bank, run, target="onnx", resume=True)
    assert capsys.readouterr().err.count("shows is not up to date") == 1
    assert (run / "loss.csv").read_bytes() == (whole / "loss.csv").read_bytes()


def test_nothing_is_written_where_nothing_was_done(road, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    train(road.bundle, road.bank, run, target="onnx", resume=True)
    new = {path.name for path in run.iterdir() if path.stat().st_mtime_ns != before.get(path)}
    assert not new & {PAGE, STEPS}
    assert not {name for name in new if name.startswith("events")}


def test_tensorboard_reads_every_step_once(road, whole, tmp_path, monkeypatch):
    """Of a run that was killed after its events were written, and resumed."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for name in ("FIRST", "EVERY"):
        monkeypatch.setattr(f"edge_dit_runtime.page.watch.{name}", 0)
    monkeypatch.setattr("edge_dit_runtime.page.watch.SHARE", 1e9)
    monkeypatch.setattr("edge_dit_runtime.training.SAVE_EVERY", 4)
    run = tmp_path / "run"
    killed_at_seven(road, run)
    half = accumulator.EventAccumulator(str(run)).Reload()
    assert [event.step for event in half.Scalars("loss")] == list(range(7))
    train(road.bundle, road.bank, run, target="onnx", resume=True)
    read = accumulator.EventAccumulator(str(run)).Reload()
    log = read_log(whole)
    wanted = {"loss": log.losses, "grad_norm": log.grad_norms, "lr": log.lrs, "sigma": log.sigmas}
    for tag, values in wanted.items():
        events = read.Scalars(tag)
        assert [event.step for event in events] == list(range(LENGTH)), tag
        np.testing.assert_allclose([event.value for event in events], values, rtol=1e-6)
    levels = [tag for tag in read.Tags()["scalars"] if tag.startswith("loss_by_sigma/")]
    assert sum(len(read.Scalars(tag)) for tag in levels) == LENGTH


def test_without_tensorboard_there_are_no_events(tmp_path, monkeypatch):
    monkeypatch.setattr("edge_dit_runtime.page.events.is_installed", lambda _: False)
    log = StepLog()
    watch = Watch(tmp_path, RUN, log)
    log.add(Step(0, 0.5, 1.0))
    watch.keep()
    watch.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [PAGE, STEPS]


# ---------------------------------------------------------------- tables and means


def test_a_log_is_read_as_it_was_written(tmp_path):
    log = made_log(50)
    log.write_steps(tmp_path)
    log.write_losses(tmp_path)
    read = read_log(tmp_path)
    assert read.skipped == list(SKIPPED)
    np.testing.assert_equal(vars(read), vars(log))
    with (tmp_path / "loss.csv").open() as file:
        assert next(csv.reader(file)) == ["step", "draw", "sigma", "loss"]


DAMAGED = ["", "nonsense\n1\n", "step,draw\n0,1\n", "step,draw,sigma,loss\n0,x,1,1\n", "\xff"]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_table_of_losses_is_refused(tmp_path, text):
    (tmp_path / "loss.csv").write_text(text, encoding="latin-1")
    with pytest.raises(BadInput, match="not a table of losses"):
        read_log(tmp_path)


@given(
    st.lists(st.tuples(st.floats(1e-3, 1.0), st.floats(0, 10)), min_size=1, max_size=40),
)
def test_losses_by_level_are_means_of_their_parts(steps):
    levels = by_level(np.array([s for s, _ in steps]), np.array([loss for _, loss in steps]))
    assert sum(level.steps for level in levels) == len(steps)
    for level in levels:
        inside = [loss for sigma, loss in steps if level.low < sigma <= level.high]
        assert level.steps == len(inside)
        assert level.loss == pytest.approx(np.mean(inside))
        assert level.high - level.low == 1 / BINS


def test_levels_are_of_the_first_and_last_steps():
    log = StepLog()
    for step in range(3 * WINDOW):
        log.add(Step(0, 0.3, float(step)))
    log.add(Step(0, 0.3, nan))
    first, last = log.by_level()
    assert (first[0].loss, first[0].steps) == ((WINDOW - 1) / 2, WINDOW)
    assert (last[0].loss, last[0].steps) == (2 * WINDOW + (WINDOW - 1) / 2, WINDOW)
    assert StepLog().by_level() == ([], [])


@given(st.lists(st.one_of(st.floats(-1e3, 1e3), st.just(nan)), max_size=90))
def test_running_means(values):
    ends, means, window = smoothed(values)
    known = [(step, value) for step, value in enumerate(values) if isfinite(value)]
    assert window == max(1, len(known) // 20)
    for place, (end, mean) in enumerate(zip(ends, means, strict=True)):
        part = known[place : place + window]
        assert end == part[-1][0]
        assert mean == pytest.approx(np.mean([value for _, value in part]), abs=1e-9)


def test_a_norm_is_finite_exactly_if_every_gradient_is():
    largest = np.finfo(np.float32).max
    assert norm({"a": np.full(4, largest, np.float32)}) == pytest.approx(2 * float(largest))
    for bad in (np.inf, -np.inf, np.nan):
        assert not isfinite(norm({"a": np.ones(3, np.float32), "b": np.array([0, bad], "f4")}))
    assert norm({"a": np.array([3.0], "f4"), "b": np.array([[4.0]], "f4")}) == 5.0


# ---------------------------------------------------------------- the page


class Reader(HTMLParser):
    """Checks that tags are balanced; keeps addresses and classes of elements."""

    VOID = frozenset({"meta", "link", "img"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def points(html: str, kind: str) -> int:
    """Points of all paths of a kind."""
    paths = re.findall(rf'<path class="{kind} [^>]* d="([^"]*)"', html)
    return sum(path.count("M") + path.count("L") for path in paths)


def test_a_page_shows_the_log(tmp_path):
    log = made_log(50)
    folder = write_run(tmp_path / "a <b> run", log)
    html = (folder / PAGE).read_text()
    read = Reader(html)
    assert "Run a &lt;b&gt; run" in html
    assert "Stopped: 50 of 60 steps." in html
    assert "7 (draw 2), 8 (draw 3), 30 (draw 0)" in html
    finite = 50 - len(SKIPPED)
    assert points(html, "dots") >= 2 * finite  # losses and norms, and the samples of legends
    assert points(html, "line") >= 2 * (finite - 1)
    assert html.count('class="marks"') == 2  # in the drawing and its legend
    assert not [tag for tag, _ in read.seen if tag in ("script", "iframe", "object")]
    links = [v for _, a in read.seen for k, v in a.items() if k in ("src", "href")]
    assert all(v and v.startswith("data:") for v in links)
    assert 'http-equiv="refresh"' not in html
    assert "nan" not in html


def test_a_page_of_a_run_that_trains_says_how_long_and_reads_itself_again(tmp_path):
    html = run_page(tmp_path, RUN, made_log(20), trains=True)
    assert "Training: 20 of 60 steps, about 10 s left." in html  # 40 steps of 0.25 s
    assert 'http-equiv="refresh"' in html
    assert "Done: 60 of 60 steps." in run_page(tmp_path, RUN, made_log(60), trains=True)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_pages_of_short_runs(tmp_path, steps):
    Reader(run_page(tmp_path, RUN, made_log(steps), trains=True))


def test_a_log_without_norms_says_so(tmp_path):
    log = StepLog()
    log.add(Step(0, 0.5, 1.0))
    html = run_page(tmp_path, RUN, log, trains=True)
    assert "logged by another version or another runtime" in html
    assert "20 of" not in html


def test_times_for_people():
    found = [duration(seconds) for seconds in (0.2, 40, 90, 300, 3599, 7800)]
    assert found == ["1 s", "40 s", "2 min", "5 min", "1 h 0 min", "2 h 10 min"]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_round_and_within(low, length):
    found = ticks(low, low + length)
    assert 2 <= len(found) <= 8
    assert found == sorted(found)
    margin = 1e-6 * length + 1e-9 * abs(low)
    assert low - margin <= found[0] <= found[-1] <= low + length + margin


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=30),
    st.booleans(),
)
def test_any_curve_is_drawn(values, logarithmic):
    html = drawn(Chart("t", "x", [Curve("c", range(len(values)), values)], logarithmic))
    Reader(html)
    assert "nan" not in html
    assert "inf" not in html


def test_the_first_and_last_previews_are_among_the_chosen():
    assert chosen([]) == []
    assert chosen([0, 10]) == [0, 10]
    found = chosen(list(range(0, 1000, 10)))
    assert (found[0], found[-1], len(found)) == (0, 990, MOST)
