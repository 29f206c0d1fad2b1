"""How far `edge_dit.budget.footprint` is from what is measured.

    python tests/benchmarks/footprint.py WORK [CASE ...] [--again TARGET] [--write]

Two families, two depths each, every target and layout, random weights of real configurations; each
figure from a fresh process (`edge_dit.app.bench`). Results are kept in WORK and measured once;
--again measures one target anew. Prints the predictions beside them; exit code 1 when one is off by
more than MEMORY_ERROR or TIME_ERROR of the footprint module, or when a plan would overrun its
budget. --write puts them into edge_dit/budget/measured.json, which `edge-dit plan --report` shows.
About an hour on two cores, which should have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edge_dit.app.bench.bench import DEFAULT_VARIANTS, EAGER, Asked, bench
from edge_dit.app.bench.model import Case
from edge_dit.budget.cost import Shapes
from edge_dit.budget.footprint import (
    MEMORY_ERROR,
    REFERENCE,
    TIME_ERROR,
    Footprint,
    Footprints,
    Profile,
    calibrated,
)
from edge_dit.budget.search import MARGIN
from edge_dit.contract.bundle import TARGETS
from edge_dit.contract.targets import INT8_VARIANTS, ROTATED, TargetVariant
from edge_dit.models.checkpoint import meta_model
from edge_dit.models.families import family_of
from edge_dit.models.public_configs import public_config
from edge_dit.store.files import write_json
from edge_dit.text import columns

CASES = {
    f"{config}-{trained}": Case(config, [trained], 256, text, full_lora=False)
    for config, text in (("sana-0.6b", 300), ("sd3-medium", 333))
    for trained in ((2, 4) if config == "sana-0.6b" else (1, 2))
}

ROTATED_CASE = "sana-0.6b-4"
"""Where rotated products are measured too: a budget takes them for plain ones that are slower."""


def wanted(name: str) -> list[TargetVariant]:
    """The variants to measure in a case."""
    rotated = [variant for variant in INT8_VARIANTS if variant.compute == ROTATED]
    return [*DEFAULT_VARIANTS, *(rotated if name == ROTATED_CASE else ())]


def measured(case: Case, work: Path, name: str, again: str | None) -> list[dict[str, Any]]:
    """The rows of a bench of the case, each with the machine's speed; what was measured before is
    not measured again, but for the target ``again``.
    """
    record = work / f"{name}.json"
    rows = json.loads(record.read_text())["rows"] if record.is_file() else []
    kept = [row for row in rows if row["target"] != again]
    there = [_execution(row) for row in kept]
    missing = [variant for variant in wanted(name) if asdict(variant) not in there]
    if missing:
        speed = {"gemm": calibrated(3.0).gemm}
        report = bench(case, Asked(missing, [EAGER]), work / name, print)
        kept += [{**asdict(row), **speed} for row in report.rows]
        write_json(record, {"rows": kept})
    return kept


def _execution(row: dict[str, Any]) -> dict[str, str]:
    return {field: row[field] for field in ("target", "layout", "dtype", "compute")}


def predicted(case: Case, execution: TargetVariant, profile: Profile) -> Footprint:
    public = public_config(case.config)
    family = family_of(public.family)
    side = round(case.tokens**0.5)
    (blocks,) = family.containers.values()
    config = {**public.config, blocks: sum(case.trained)}
    shapes = Shapes(family, meta_model(family, config), (side, side), case.text)
    return Footprints(shapes, profile).of(range(sum(case.trained)), case.rank, execution)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--again", metavar="TARGET", choices=TARGETS)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    rows = []
    for name in asked.cases or CASES:
        for row in measured(CASES[name], asked.work, name, asked.again):
            execution = TargetVariant(**_execution(row))
            foreseen = predicted(CASES[name], execution, REFERENCE.at(row["gemm"]))
            rows.append(
                {
                    "case": CASES[name].config,
                    "trained": sum(CASES[name].trained),
                    "execution": str(execution),
                    "anonymous": 1e6 * row["rss_anon_mb"],
                    "predicted_anonymous": foreseen.anonymous,
                    "file": 1e6 * row["rss_file_mb"],
                    "predicted_file": foreseen.file,
                    "seconds": row["step_ms"] / 1000,
                    "predicted_seconds": foreseen.seconds,
                }
            )
    table = [(f"{r['case']}, {r['trained']} blocks, {r['execution']}", _cells(r)) for r in rows]
    print(*columns(["anonymous, MB", "", "files, MB", "", "step, ms", ""], table), sep="\n")
    worst = {kind: max(abs(_off(row, kind)) for row in rows) for kind in KINDS}
    print(*(f"worst {kind}: {value:.1%}" for kind, value in worst.items()))
    if asked.write:
        import edge_dit

        about = {"machine": REFERENCE.name, "rows": rows}
        write_json(Path(edge_dit.__file__).parent / "budget" / "measured.json", about)
    above = [
        f"{r['case']} {r['execution']}"
        for r in rows
        if r["anonymous"] + r["file"] > MARGIN * (r["predicted_anonymous"] + r["predicted_file"])
    ]
    print(f"above what `plan --ram` would have let pass: {', '.join(above) or 'none'}")
    memory = max(worst["anonymous"], worst["file"])
    far = worst["seconds"] > TIME_ERROR or memory > MEMORY_ERROR
    return int(far or bool(above))


KINDS = {"anonymous": 1e6, "file": 1e6, "seconds": 0.001}
"""What is compared, and the unit it is shown in."""


def _off(row: dict[str, Any], kind: str) -> float:
    return row[f"predicted_{kind}"] / row[kind] - 1


def _cells(row: dict[str, Any]) -> list[str]:
    cells = []
    for kind in KINDS:
        unit = KINDS[kind]
        cells.append(f"{row[f'predicted_{kind}'] / unit:.0f} of {row[kind] / unit:.0f}")
        cells.append(f"{_off(row, kind):+.1%}")
    return cells


if __name__ == "__main__":
    sys.exit(main())
