"""Memory and time of the three tails in the streamed layout, on SANA-0.6B's shapes.

    python tests/benchmarks/tails.py WORK docs/results/tails-memory.json

Random weights, 256 image and 300 text tokens, 7 trained blocks and 7 of the tail, float16 weights.
Every row is a process of its own, watched from outside like those of `edge-dit bench`.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from edge_dit.app.bench.bench import run_task
from edge_dit.app.bench.child import ExportTask, ReferenceTask, SessionTask, plan_file
from edge_dit.app.bench.machine import this_machine
from edge_dit.app.bench.model import Case, random_model
from edge_dit.contract.names import STORED, TAILS
from edge_dit.contract.targets import TargetVariant
from edge_dit.store.files import write_json

CASE = Case("sana-0.6b", [14], 256, 300, steps=7, full_lora=False)
TAIL = 7
WAY = TargetVariant("onnx", "streamed", "float16")


def main(work: Path, result: Path) -> None:
    plan = random_model(CASE, work)
    rows = {}
    for tail in TAILS:
        own = plan.model_copy(update={"tail_skip": TAIL, "tail": tail})
        write_json(plan_file(work), own.model_dump(mode="json"))
        bundle = work / f"bundle-{tail}"
        if tail == STORED:  # the others take its draw, in which their names are
            run_task(ReferenceTask(work, WAY.dtype))
        if not bundle.exists():
            run_task(ExportTask(work, WAY, bundle))
        trained = run_task(SessionTask(work, WAY, bundle, CASE.steps, work / "gradients"))
        size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
        rows[tail] = {**asdict(trained), "bundle_bytes": size}
        print(tail, rows[tail], flush=True)
    machine = asdict(this_machine())
    write_json(result, {"case": asdict(CASE), "tail": TAIL, "machine": machine, "rows": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
