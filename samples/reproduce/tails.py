"""What takes the place of skipped last blocks: the runs of three tails as one table and figure.

    python samples/reproduce/run.py --work DIR --only base {stored,fresh,through}-{30,40,50}
    ... and the same with --model tiny-flux
    python samples/reproduce/tails.py DIR docs/results

writes tails.json and tails.png there, and prints the table of docs/method.md. The criterion was
fixed before the first run: `arms.CLAIMS`, "a fresh tail ..." and "a gradient through ...".
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from arms import ARMS, CLAIMS
from matplotlib import pyplot as plt
from tables import LOSS, Results, collect, gain, judge, measured, save, shown, table

from edge_dit.contract.names import FRESH, STORED, TAILS, THROUGH
from edge_dit.store.files import write_json

MODELS = ("tiny-sana", "tiny-flux")
PERCENTS = (30, 40, 50)
OURS = [claim for claim in CLAIMS if claim.pairs[0][0].startswith((FRESH, THROUGH))]
PAIRS = ((FRESH, STORED), (THROUGH, FRESH), (THROUGH, STORED))


def of(model: str, work: Path) -> Results:
    """The runs of the three tails, and of the base model."""
    runs = work / model / "runs"
    wanted = [name for name in ARMS if name == "base" or name.split("-")[0] in TAILS]
    files = [f.stem for name in wanted for f in sorted(runs.glob(f"{name}-*.json"))]
    return collect(list(dict.fromkeys(files)), runs)


def gains(results: Results, percent: int) -> list[str]:
    pairs = ((f"{one}-{percent}", f"{other}-{percent}") for one, other in PAIRS)
    return [shown(gain(results, *pair, LOSS)) for pair in pairs]


def rows(model: str, results: Results) -> list[list[str]]:
    """A line for each share of skipped blocks that was run."""
    lines = []
    for percent in PERCENTS:
        names = [f"{tail}-{percent}" for tail in TAILS]
        if all(name in results for name in names):
            losses = [str(measured(results, name, LOSS)) for name in names]
            lines.append([model, f"{percent} %", *losses, *gains(results, percent)])
    return lines


def as_json(results: Results) -> dict[str, Any]:
    """Every run's loss, the settings, and the verdicts."""
    return {
        "claims": {claim.says: judge(results, claim) for claim in OURS},
        "gains": {
            f"{one} over {other}, {percent} %": shown(
                gain(results, f"{one}-{percent}", f"{other}-{percent}", LOSS)
            )
            for percent in PERCENTS
            for one, other in PAIRS
        },
        "settings": {arm: next(iter(runs.values()))["settings"] for arm, runs in results.items()},
        "runs": [
            {key: run[key] for key in ("arm", "subject", "seed", LOSS, "similarity", "train_loss")}
            for runs in results.values()
            for run in runs.values()
        ],
    }


def draw(everything: dict[str, Results], path: Path) -> None:
    """By how much each tail that runs beats the stored one."""
    canvas, grid = plt.subplots(
        1, len(everything), figsize=(9, 3.6), layout="constrained", squeeze=False
    )
    for axes, (model, results) in zip(grid.flat, everything.items(), strict=True):
        for shift, tail in ((-1, FRESH), (1, THROUGH)):
            pairs = {p: gain(results, f"{tail}-{p}", f"{STORED}-{p}", LOSS) for p in PERCENTS}
            there = {percent: found for percent, found in pairs.items() if found is not None}
            axes.errorbar(
                [percent + shift for percent in there],
                [found.mean for found in there.values()],
                yerr=[2 * (found.error or 0) for found in there.values()],
                fmt="o",
                capsize=3,
                label=tail,
            )
        axes.axhline(0, color="black", lw=0.8)
        axes.set_title(model)
        axes.set_xticks(PERCENTS)
        axes.set_xlabel("% of blocks skipped")
        axes.grid(alpha=0.3)
        axes.legend()
    grid[0][0].set_ylabel("held-out loss gained over a stored\ntail (bars: 2 standard errors)")
    save(canvas, path)


def main(work: Path, out: Path) -> None:
    everything = {model: of(model, work) for model in MODELS}
    write_json(out / "tails.json", {model: as_json(found) for model, found in everything.items()})
    draw(everything, out / "tails.png")
    lines = [line for model, results in everything.items() for line in rows(model, results)]
    versus = [f"{one} over {other}" for one, other in PAIRS]
    print(table(["model", "skipped", *TAILS, *versus], lines))
    for model, results in everything.items():
        for claim in OURS:
            print(f"{model}: {claim.says}: {judge(results, claim)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
