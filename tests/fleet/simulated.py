"""A fleet in Flower's simulation engine: what it learned, as JSON.

python tests/fleet/simulated.py BUNDLE BANK OUT HOW ROUNDS STEPS NOISE
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ |= {"RAY_worker_niceness": "0"}  # 15 by default: on a busy machine they hardly run

import numpy as np
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

from edge_dit.store.tensors import write_tensors
from edge_dit_runtime.fleet.averaging import check_how
from edge_dit_runtime.fleet.client import Place, client_app
from edge_dit_runtime.fleet.server import Privacy, Rounds, lead

DEVICES = 8
bundle, bank, out, how, rounds, steps, noise = sys.argv[1:]
asked = Rounds(
    DEVICES,
    int(rounds),
    int(steps),
    check_how(how),
    Privacy(float(noise), clip=0.5) if float(noise) else None,
)
app = ServerApp()
seen: list[int] = []


@app.main()
def main(grid, context) -> None:
    outcome = lead(Path(bundle), asked, grid, lambda number, adapter: seen.append(number))
    write_tensors(Path(out) / "adapter.safetensors", outcome.adapter)
    told = {"losses": outcome.losses, "epsilon": outcome.epsilon, "seen": seen}
    (Path(out) / "outcome.json").write_text(json.dumps(told))


place = Place(Path(bundle), bank=Path(bank))
run_simulation(
    app,
    client_app(lambda config: place),
    DEVICES,
    # A Ray of its own: Flower's would join one that runs here, of another version perhaps.
    backend_config={"client_resources": {"num_cpus": 1}, "init_args": {"address": "local"}},
)
assert np.isfinite(json.loads((Path(out) / "outcome.json").read_text())["losses"]).all()
