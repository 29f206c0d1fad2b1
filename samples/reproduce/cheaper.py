"""What a cheaper way to train costs: its runs beside those of the paper's recipe, as one table.

    python samples/reproduce/run.py --work DIR --only base skip-30 skip-50 int8-30 int8-50
    ... and the same with --model tiny-flux
    python samples/reproduce/cheaper.py int8 DIR docs/results

writes int8.json there and prints the table of docs/method.md. "lean" in the place of "int8" is
AdamW without its first moment. The criterion was fixed before the first run of each: the mean
held-out loss of the cheaper way lies within two standard errors of the other's. "lean" has the
job's learning rate, as AdamW has; none was searched for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from tables import LOSS, Results, collect, gain, measured, shown, table

from edge_dit.store.files import write_json

NAMES = {"int8": ("float32", "int8"), "lean": ("both moments", "second moment")}
"""Kind of arm -> what the table calls the usual way and it."""
MODELS = ("tiny-sana", "tiny-flux")
PERCENTS = (30, 50)
ERRORS = 2


def of(model: str, kind: str, work: Path) -> Results:
    """The runs of both ways to train, and of the base model."""
    runs = work / model / "runs"
    arms = ["base", *(f"{way}-{p}" for p in PERCENTS for way in ("skip", kind))]
    return collect([file.stem for arm in arms for file in sorted(runs.glob(f"{arm}-*.json"))], runs)


def row(results: Results, kind: str, percent: int) -> dict[str, Any]:
    """Losses of both, their difference within the same toy and seed, and the verdict."""
    usual, cheaper = NAMES[kind]
    exact, found = (measured(results, f"{way}-{percent}", LOSS) for way in ("skip", kind))
    paired = gain(results, f"{kind}-{percent}", f"skip-{percent}", LOSS)
    within = abs(found.mean - exact.mean) <= ERRORS * (exact.error or 0)
    return {
        usual: str(exact),
        cheaper: str(found),
        f"gained by {kind}": shown(paired),
        "verdict": "holds" if within else "does not hold",
    }


def main(kind: str, work: Path, out: Path) -> None:
    rows = {model: {p: row(of(model, kind, work), kind, p) for p in PERCENTS} for model in MODELS}
    runs = {
        model: [
            {key: run[key] for key in ("arm", "subject", "seed", LOSS, "similarity", "train_loss")}
            for arm in of(model, kind, work).values()
            for run in arm.values()
        ]
        for model in MODELS
    }
    write_json(out / f"{kind}.json", {"rows": rows, "runs": runs})
    cells = [
        [m, f"{p} %", *found.values()] for m, of_m in rows.items() for p, found in of_m.items()
    ]
    print(table(["model", "skipped", *rows[MODELS[0]][PERCENTS[0]]], cells))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
