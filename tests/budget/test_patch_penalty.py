"""The patch penalty is that of the stored ablation: samples/reproduce/results."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from edge_dit.budget import search
from edge_dit.budget.search import PATCH_PENALTY

RESULTS = Path(__file__).parents[2] / "samples" / "reproduce" / "results"


def shares(model: str, arm: str) -> tuple[np.ndarray, float]:
    """The improvement in held-out loss over the arm "base", as a share of that of the arm "full":
    one number for each subject and seed. And s_min / s_max of the arm.
    """
    results = json.loads((RESULTS / model / "results.json").read_text())
    loss = {(r["arm"], r["subject"], r["seed"]): r["heldout_loss"] for r in results["runs"]}
    runs = [key[1:] for key in loss if key[0] == arm]
    assert len(runs) == 8
    values = [
        (loss["base", *run] - loss[arm, *run]) / (loss["base", *run] - loss["full", *run])
        for run in runs
    ]
    settings = results["arms"][arm]
    assert settings["rank"] == results["arms"]["full"]["rank"]
    assert settings["blocks"] == results["arms"]["full"]["blocks"]
    return np.array(values), settings["arm"]["patch"]


def in_percent(values: np.ndarray) -> str:
    """Mean ± standard error."""
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{100 * values.mean():.1f} ± {100 * error:.1f} %"


def test_the_penalty_is_calibrated_on_both_models():
    (sana, half), (flux, same) = (shares(m, "low-to-high") for m in ("tiny-sana", "tiny-flux"))
    assert half == same == 0.5
    missing = 1 - (sana.mean() + flux.mean()) / 2
    assert round(missing / (1 - half), 2) == PATCH_PENALTY


def test_an_arm_that_was_left_out_agrees():
    large, patch = shares("tiny-sana", "low-to-high-large")
    error = np.std(large, ddof=1) / np.sqrt(len(large))
    assert patch == 0.875
    assert large.mean() == pytest.approx(1 - PATCH_PENALTY * (1 - patch), abs=2 * error)


def test_the_docstring_has_these_figures():
    words = re.sub(r"\s+", " ", search.__doc__ or "")
    for model, arm in (
        ("tiny-sana", "low-to-high"),
        ("tiny-flux", "low-to-high"),
        ("tiny-sana", "low-to-high-large"),
    ):
        assert in_percent(shares(model, arm)[0]) in words
    assert f"{100 * (1 - PATCH_PENALTY * 0.125):.1f} % by the formula" in words


def test_rank_and_weights_have_no_arm():
    """Why their penalties are called assumed: the day that one is measured, calibrate them."""
    for model in ("tiny-sana", "tiny-flux"):
        arms = json.loads((RESULTS / model / "results.json").read_text())["arms"]
        assert {arm["rank"] for arm in arms.values()} == {16}
        assert not [arm for arm in arms.values() if "weights" in arm]
