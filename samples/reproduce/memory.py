"""Bytes that a training step of some arms keeps, on both models, as a table.

    python samples/reproduce/memory.py

What autograd saves is measured, on one draw, with attention in its math form as in exported graphs;
the rest is counted: frozen weights of the blocks that run and of the head (in int8 one byte an
element of each matrix, and a float32 scale for each of its rows), LoRA and its gradients, AdamW's
moments, a sum of gradients where a step has several draws, and what blocks hear of one draw. All
else is float32. The bank stays on disk. Writes results/<model>/memory.json.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.append(str(Path(__file__).resolve().parents[1]))

from arms import ARMS
from experiment import Trainer
from run import JOBS, SAMPLES, all_runs
from runs import Run, pipeline_of
from side_by_side import remove_many_lora

from edge_dit.contract.names import COND, OUTSIDE
from edge_dit.contract.targets import WIDE
from edge_dit.store.files import write_json

NAMES = (
    "skip-50",
    "window-50",
    "window-four-50",
    "window-four-fresh-50",
    "ring-four-50",
    "context-four-50",
    "context-four-fresh-50",
    "best-50",
)
HERE = Path(__file__).resolve().parent


def bytes_of(run: Run) -> dict[str, int]:
    """What a step of an arm keeps, by kind."""
    arm, trainer = ARMS[run.arm], Trainer([run])
    lora = [parameter for layer in trainer.lora for parameter in (layer.a, layer.b)]
    batch = trainer.batch(0)
    heard = [value for name, value in batch[0].items() if name.startswith(COND + OUTSIDE)]
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with (
        sdpa_kernel(SDPBackend.MATH),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        trainer.sessions.losses(batch).sum().backward()
    weights = {p.untyped_storage()._cdata for p in trainer.subgraph.parameters()}
    kept = [t for storage, t in saved.items() if storage not in weights]
    frozen = 4 * sum(p.numel() for p in trainer.subgraph.parameters() if not p.requires_grad)
    if arm.compute != WIDE:
        matrices = [module.weight for module in trainer.frozen]
        frozen -= sum(3 * weight.numel() - 4 * weight.shape[0] for weight in matrices)
    adapter = 4 * sum(p.numel() for p in lora)
    moments = 2 if arm.beta1 else 1
    remove_many_lora(pipeline_of(run.job).transformer)
    return {
        "frozen": frozen,
        "LoRA and gradients": 2 * adapter,
        "moments": moments * adapter,
        "sum of gradients": adapter if arm.draws > 1 else 0,
        "activations": sum(tensor.untyped_storage().nbytes() for tensor in kept),
        "heard": sum(part.numel() * part.element_size() for part in heard),
    }


def main() -> None:
    torch.set_num_threads(1)
    for model in JOBS:
        with tempfile.TemporaryDirectory() as work:
            runs = all_runs(SAMPLES / JOBS[model], Path(work), 1, 1, 2, NAMES)
            found = {run.arm: bytes_of(run) for run in runs}
        write_json(HERE / "results" / model / "memory.json", found)
        for arm, parts in found.items():
            print(model, arm, sum(parts.values()), parts, flush=True)


if __name__ == "__main__":
    main()
