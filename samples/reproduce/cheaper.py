"""What training in int8 costs: the runs of int8 beside those of float32, as one table.

    python samples/reproduce/run.py --work DIR --only base skip-30 skip-50 int8-30 int8-50
    ... and the same with --model tiny-flux
    python samples/reproduce/int8.py DIR docs/results

writes int8.json there and prints the table of docs/method.md. The criterion was fixed before the
first run: the mean held-out loss in int8 lies within two standard errors of float32's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from tables import LOSS, Results, collect, gain, measured, shown, table

from edge_dit.store.files import write_json

MODELS = ("tiny-sana", "tiny-flux")
PERCENTS = (30, 50)
ERRORS = 2


def of(model: str, work: Path) -> Results:
    """The runs of both ways to compute, and of the base model."""
    runs = work / model / "runs"
    arms = ["base", *(f"{kind}-{p}" for p in PERCENTS for kind in ("skip", "int8"))]
    return collect([file.stem for arm in arms for file in sorted(runs.glob(f"{arm}-*.json"))], runs)


def row(results: Results, percent: int) -> dict[str, Any]:
    """Losses of both, their difference within the same toy and seed, and the verdict."""
    exact, found = (measured(results, f"{kind}-{percent}", LOSS) for kind in ("skip", "int8"))
    paired = gain(results, f"int8-{percent}", f"skip-{percent}", LOSS)
    within = abs(found.mean - exact.mean) <= ERRORS * (exact.error or 0)
    return {
        "float32": str(exact),
        "int8": str(found),
        "gained by int8": shown(paired),
        "verdict": "holds" if within else "does not hold",
    }


def main(work: Path, out: Path) -> None:
    rows = {model: {p: row(of(model, work), p) for p in PERCENTS} for model in MODELS}
    runs = {
        model: [
            {key: run[key] for key in ("arm", "subject", "seed", LOSS, "similarity", "train_loss")}
            for arm in of(model, work).values()
            for run in arm.values()
        ]
        for model in MODELS
    }
    write_json(out / "int8.json", {"rows": rows, "runs": runs})
    cells = [
        [m, f"{p} %", *found.values()] for m, of_m in rows.items() for p, found in of_m.items()
    ]
    print(table(["model", "skipped", *rows[MODELS[0]][PERCENTS[0]]], cells))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
