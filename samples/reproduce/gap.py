"""How far what a skipping arm trains on is from the model that it is for.

    python samples/reproduce/gap.py [--model tiny-sana|tiny-flux] [--subjects 2] [--seeds 2]
        [--steps 200]

Trains each arm as run.py does; then prints, for draws of its bank, the loss with whatever stood in
for the skipped blocks (what training saw) and with these blocks run (what the user gets). Both are
at the patch's size, so that neither crop nor size plays a part.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from arms import ARMS
from draws import bank_of, stored
from experiment import blocks_of, train
from run import JOBS, SAMPLES, all_runs
from runs import Run, model_for, pipeline_of, plan_for
from side_by_side import ManyLora, ManySessions, remove_many_lora
from tables import mean_of, table

from edge_dit.contract.adamw import AdamW
from edge_dit.models.subgraph import TrainableSubgraph

NAMES = ("skip-50", "bare-50", "drawn-50", "drawn-bare-50")
DRAWS = 32


@torch.no_grad()
def losses(runs: list[Run], blocks: list[int]) -> torch.Tensor:
    """Mean loss over the first `DRAWS` draws of each run's bank when ``blocks`` run, [runs]."""
    arm, plan = ARMS[runs[0].arm], plan_for(runs[0])
    model = pipeline_of(runs[0].job).transformer
    layers = [module for module in model.modules() if isinstance(module, ManyLora)]
    subgraph = TrainableSubgraph(model, model_for(runs[0].job).family, blocks, plan.grid)
    sessions = ManySessions(subgraph, layers, AdamW(0))
    banks = [bank_of(run)[:DRAWS] for run in runs]
    residuals = arm.stand_in == "residual"
    found = [
        sessions.losses([stored(through, blocks, residuals) for through in draws])
        for draws in zip(*banks, strict=True)
    ]
    return torch.stack(found).mean(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=JOBS, default="tiny-sana")
    parser.add_argument("--subjects", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        sizes = (asked.subjects, asked.seeds, asked.steps)
        runs = all_runs(SAMPLES / JOBS[asked.model], Path(work), *sizes, NAMES)
        for name in NAMES:
            group = [run for run in runs if run.arm == name]
            train(group)
            everything = list(range(plan_for(group[0]).layers))
            seen, whole = losses(group, blocks_of(group[0])), losses(group, everything)
            remove_many_lora(pipeline_of(group[0].job).transformer)
            means = (mean_of(column.tolist()) for column in (seen, whole, whole - seen))
            rows.append([f"`{name}`", *means, len(group)])
    print(table(["arm", "as trained", "all blocks run", "difference", "runs"], rows))


if __name__ == "__main__":
    main()
