"""Fit the planner's prediction of quality to the ablations: edge_dit/budget/quality.json.

    python samples/reproduce/calibrate.py [samples/reproduce/results] [-o FOLDER]

Of results.json it takes the arms that differ in skipped blocks, tail, patch, surroundings and rank
alone, and of several with the same blocks the first. The fit is least squares without factors below
0 (`edge_dit.budget.quality`). Prints a table of every point with the prediction of the factors that
fit the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

sys.path.append(str(Path(__file__).resolve().parents[1]))

from arms import MODELS, Arm
from tables import Mean, mean_of, table

from edge_dit.budget.quality import NAME, Terms, skip_cost, terms_of_patch
from edge_dit.contract.split import inner_runs
from edge_dit.planning.selection import NAME as SELECTION
from edge_dit.planning.selection import Selection, read_selection
from edge_dit.store.files import write_json

SAMPLES = Path(__file__).resolve().parents[1]
WORDS = ("title", "source")
GIVEN = ("context", "cell")
DIFFER = ("skipped", "where", "tail", "crop", "patch", "rank", "stand_in", "family", *GIVEN)
"""What may differ between the arms that are taken."""
CROPS = ("low-to-high", "window", "whole")


def is_plain(arm: dict[str, Any], model: str) -> bool:
    """Whether an arm differs from the paper's recipe in what a plan decides alone."""
    plain = asdict(Arm("", ""))
    fixed = plain.keys() - {*WORDS, *DIFFER}
    same = all(arm.get(key, plain[key]) == plain[key] for key in fixed)
    context = arm.get("context", "")
    # surroundings as a plan has them: means over cells in FLUX, sums in SANA
    given = context == "all" and (MODELS[model] != "flux" or arm["cell"] > 1)
    return same and (given or not context) and arm["crop"] in CROPS and arm["stand_in"] != "nothing"


def terms_of(settings: dict[str, Any], selection: Selection, highest: int) -> Terms:
    """What an arm gives up.

    Args:
        settings: of the arm, in results.json.
        selection: of the model.
        highest: rank of full LoRA.
    """
    arm, blocks = settings["arm"], settings["blocks"]
    runs = [(first, after) for after, first in inner_runs(blocks).items()]
    tail = selection.layers - 1 - blocks[-1]
    kind = "through" if arm["stand_in"] == "blocks" else arm["tail"]
    share = 1.0 if arm["crop"] == "whole" else arm["patch"]
    skipped = skip_cost(selection, (blocks[0], tail, runs), kind)
    halvings = float(np.log2(highest / settings["rank"]))
    patch = terms_of_patch(share, arm["crop"] == "window", bool(arm.get("context")))
    return replace(patch, skipped=skipped, rank=halvings)


def shares(results: dict[str, Any], arm: str) -> Mean:
    """The share of full LoRA's gain that an arm's runs keep."""
    loss = {(r["arm"], r["subject"], r["seed"]): r["heldout_loss"] for r in results["runs"]}
    runs = [key[1:] for key in loss if key[0] == arm]
    return mean_of(
        [
            (loss["base", *run] - loss[arm, *run]) / (loss["base", *run] - loss["full", *run])
            for run in runs
        ]
    )


def fit(rows: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Factors of the terms, none below 0."""
    return nnls(rows, missing)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=SAMPLES / "reproduce" / "results")
    default = SAMPLES.parent / "edge_dit" / "budget"
    parser.add_argument("-o", "--out", type=Path, default=default)
    asked = parser.parse_args()
    points: list[dict[str, Any]] = []
    for model in MODELS:
        results = json.loads((asked.results / model / "results.json").read_text())
        selection = read_selection(SAMPLES / model / SELECTION)
        highest = results["arms"]["full"]["rank"]
        for arm, settings in results["arms"].items():
            if arm in ("base", "full") or not is_plain(settings["arm"], model):
                continue
            try:
                terms = terms_of(settings, selection, highest)
            except ValueError:
                continue  # skips a run that the selection did not measure
            at = {"model": model, "terms": asdict(terms)}
            if any(at.items() <= point.items() for point in points):
                continue  # of the same blocks as one before: it would predict itself
            share = shares(results, arm)
            at["arm"] = arm
            points.append({**at, "kept": share.mean, "error": share.error})
    rows = np.array([list(point["terms"].values()) for point in points])
    missing = np.array([1 - point["kept"] for point in points])
    for number, point in enumerate(points):
        others = np.arange(len(points)) != number
        point["predicted"] = float(1 - rows[number] @ fit(rows[others], missing[others]))
    off = np.array([point["kept"] - point["predicted"] for point in points])
    factors = Terms(*fit(rows, missing).tolist())
    error = float(np.sqrt(np.mean(off**2)))
    write_json(asked.out / NAME, {"factors": asdict(factors), "error": error, "points": points})
    lines = [
        [p["model"], f"`{p['arm']}`", *(f"{100 * p[key]:.1f} %" for key in ("kept", "predicted"))]
        for p in points
    ]
    print(table(["model", "arm", "kept", "predicted without it"], lines))
    print(f"{factors}; leave-one-out error {100 * error:.1f} % over {len(points)} points")


if __name__ == "__main__":
    main()
