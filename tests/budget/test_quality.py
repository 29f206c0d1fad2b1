"""What a plan is predicted to keep is fitted to the stored ablations: samples/reproduce/results."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_dit.budget import quality as calibrated
from edge_dit.budget.quality import NAME, Quality, Terms, quality, skip_cost, terms_of
from edge_dit.contract.names import FRESH, STORED, THROUGH
from selections import selection

SAMPLES = Path(__file__).parents[2] / "samples"


def test_it_is_what_the_stored_ablations_give(tmp_path):
    script = SAMPLES / "reproduce" / "calibrate.py"
    subprocess.run([sys.executable, script, "-o", tmp_path], check=True, capture_output=True)
    found = json.loads((tmp_path / NAME).read_text())
    stored = json.loads((Path(calibrated.__file__).parent / NAME).read_text())
    assert [(p["model"], p["arm"]) for p in found["points"]] == [
        (p["model"], p["arm"]) for p in stored["points"]
    ]
    assert found["error"] == pytest.approx(stored["error"], rel=1e-6)
    assert found["factors"] == pytest.approx(stored["factors"], rel=1e-6)


def test_every_term_costs_something_and_both_models_are_in_it():
    found = quality()
    assert min(found.factors.values()) > 0
    assert {point.model for point in found.points} == {"tiny-sana", "tiny-flux"}


def test_the_error_is_that_of_points_that_were_left_out():
    found = quality()
    off = [point.kept - point.predicted for point in found.points]
    assert found.error == pytest.approx(np.sqrt(np.mean(np.square(off))))
    # the fit itself is closer than predictions of what it has not seen
    seen = [point.kept - (1 - found.missing(point.terms)) for point in found.points]
    assert np.sqrt(np.mean(np.square(seen))) < found.error


def test_a_share_is_a_share():
    given = Quality(Terms(0.5, 0.4, 0.2, 0.01), 0.02, [])
    assert given.kept(Terms()) == 1
    assert given.kept(Terms(skipped=1.0, crop=0.5)) == pytest.approx(0.3)
    assert given.kept(Terms(window=0.5, rank=2)) == pytest.approx(0.88)
    assert given.kept(Terms(skipped=9.0)) == 0
    assert "30 %" in given.in_words(Terms(skipped=1.0, crop=0.5))
    assert "2.0 %" in given.in_words(Terms())


def test_what_skipping_costs_is_in_what_skipping_all_costs():
    measured = selection(
        head=(0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0), tail=(0, 0.15, 0.35, 0.6, 0.8, 0.9, 1.0)
    )
    stored, fresh, through = (
        skip_cost(measured, (2, 1, ()), tail) for tail in (STORED, FRESH, THROUGH)
    )
    assert stored == pytest.approx(0.35)
    assert through < fresh < stored
    run = measured.model_copy(update={"tail_run": [0, 0.01, 0.02, 0.03, 0.04, 0.05, 1.0]})
    assert skip_cost(run, (2, 1, ()), THROUGH) == pytest.approx(0.21)


def test_a_plan_with_a_run_that_was_not_measured_is_not_predicted(road):
    measured = selection(
        head=[0, 0.1, 0.2, 0.4, 1.0], tail=[0, 0.15, 0.35, 0.6, 1.0], layers=road.plan.layers
    )
    crops = terms_of(road.plan, measured)
    assert crops == Terms(0.25, 0.5)
    windows = road.plan.model_copy(update={"window": True})
    assert terms_of(windows, measured) == Terms(0.25, 0.0, 0.5)
    inner = road.plan.model_copy(update={"head_skip": 0, "tail_skip": 0, "inner_skips": [(1, 2)]})
    assert terms_of(inner, measured) is None
