"""What a Ray cluster costs: a bank of tiny-sana with and without one, in turns, on this machine.

    OMP_NUM_THREADS=1 python tests/benchmarks/ray_overhead.py [--draws 400] [--runs 2] -o out.json

The cluster has one processor, so that it does the same work with as much; it is up before the clock
starts, its worker process is not.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import edge_dit as ed
from edge_dit.cluster.pool import Pool, connected
from edge_dit.planning.plan import Plan
from edge_dit.store.files import write_json

JOB = Path(__file__).resolve().parents[2] / "samples" / "sana.toml"


def seconds_of(plan: Plan, job: ed.Job, pool: Pool | None) -> float:
    """Wall time of a bank, seconds."""
    pictures = ed.read_pictures(job, plan)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        ed.precompute(plan, pictures, Path(folder) / "bank", pool=pool)
        return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args()
    os.environ |= {"RAY_worker_niceness": "0"}  # 15 by default
    job = ed.read_job(JOB)
    plan = ed.plan(job).model_copy(update={"draws": asked.draws})
    rows = []
    from ray.cluster_utils import Cluster

    cluster = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for run in range(asked.runs):
        for name in ("alone", "cluster"):
            load = os.getloadavg()[0]
            if name == "alone":
                taken = seconds_of(plan, job, None)
            else:
                with connected(cluster.address) as pool:
                    taken = seconds_of(plan, job, pool)
            rows.append({"run": run, "where": name, "seconds": round(taken, 2), "load": load})
            print(json.dumps(rows[-1]), flush=True)
    cluster.shutdown()
    write_json(asked.output, {"draws": asked.draws, "rows": rows})


if __name__ == "__main__":
    main()
