"""What int8 products cost where single channels or weights stand out, as they are and rotated.

    python tests/benchmarks/outliers.py WORK docs/results/outliers.json

SANA-0.6B's shapes, 4 blocks with random weights, 256 image and 300 text tokens. Three models: as
they are; with 12 channels of every modulation 15 times as large; with weights of a heavy-tailed
distribution (Student's t of 3 degrees of freedom). Relative error of every LoRA gradient (norm of
the difference over its norm) against the same model in float32.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from edge_dit.app.bench.child import plan_file
from edge_dit.app.bench.model import Case, random_model
from edge_dit.contract.adapter import with_random_b
from edge_dit.contract.targets import INT8, ROTATED
from edge_dit.models.int8_products import computing_in_int8
from edge_dit.models.quantize import matrices, round_subgraph
from edge_dit.models.subgraph import TrainableSubgraph
from edge_dit.planning.plan import Plan, model_of
from edge_dit.reference.eager import EagerSession, adapted_subgraph
from edge_dit.store.files import write_json

CASE = Case("sana-0.6b", [4], 256, 300, steps=1, full_lora=False)
CHANNELS, TIMES, FREEDOM = 12, 15.0, 3.0


def as_it_is(subgraph: TrainableSubgraph) -> None:
    """Change nothing."""


def loud_channels(subgraph: TrainableSubgraph) -> None:
    for block in subgraph.blocks():
        table = block.scale_shift_table.data  # shift, scale, gate of attention; of feed-forward
        for row in (1, 4):
            table[row, :CHANNELS] = TIMES - 1  # x is multiplied by 1 + scale


def heavy_tails(subgraph: TrainableSubgraph) -> None:
    t = torch.distributions.StudentT(FREEDOM)
    torch.manual_seed(0)
    for weight in matrices(subgraph).values():
        values = t.sample(weight.shape)
        weight.data = values * weight.data.std() / values.std()


def gradients(subgraph: TrainableSubgraph, plan: Plan, draw: dict[str, np.ndarray]) -> dict:
    session = EagerSession(subgraph, plan.optimizer)
    session.load_adapter(with_random_b(session.adapter()))
    session.backward(draw)
    return session.gradients()


def errors(plan: Plan, change: Callable[[TrainableSubgraph], None]) -> dict[str, dict[str, float]]:
    subgraph, batch = adapted_subgraph(plan, model_of(plan, check=False))
    change(subgraph)
    rng = np.random.default_rng(0)
    draw = {
        name: value.numpy()
        if name.endswith("mask")
        else rng.normal(size=tuple(value.shape)).astype(np.float32)
        for name, value in batch.items()
    }
    exact = gradients(subgraph, plan, draw)
    found = {}
    for stored in (INT8, ROTATED):
        rounded = copy.deepcopy(subgraph)
        round_subgraph(rounded, stored)
        with computing_in_int8(rounded.blocks()):
            got = gradients(rounded, plan, draw)
        each = [float(np.linalg.norm(got[n] - exact[n]) / np.linalg.norm(exact[n])) for n in exact]
        found[stored] = {"median": float(np.median(each)), "worst": max(each)}
    return found


def main(work: Path, result: Path) -> None:
    plan = random_model(CASE, work)
    write_json(plan_file(work), plan.model_dump(mode="json"))
    plan = plan.model_copy(update={"model": (work / "model").resolve()})
    rows = {}
    for change in (as_it_is, loud_channels, heavy_tails):
        rows[change.__name__] = errors(plan, change)
        print(change.__name__, rows[change.__name__], flush=True)
    settings = {"channels": CHANNELS, "times": TIMES, "freedom": FREEDOM}
    write_json(result, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
