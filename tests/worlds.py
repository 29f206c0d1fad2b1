"""A small pipeline of a family on disk, with a plan, a bank and a bundle: what mutants are made of.

python tests/worlds.py FOLDER PIPELINE [TARGET ...]
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

import pipelines
import tiny
from edge_dit.pictures.dataset import read_folder
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import Plan

DRAWS = 24
"""Enough that a trajectory of 20 steps sees different ones."""


@dataclass(frozen=True)
class World:
    """What the stages wrote for a pipeline.

    Attributes:
        name: of the pipeline.
        plan: with the folder of its model.
        bank: folder.
        bundle: folder.
    """

    name: str
    plan: Plan
    bank: Path
    bundle: Path


def make_world(
    folder: Path,
    name: str,
    targets: tuple[str, ...],
    seed: int = 3,
    rank: int = 2,
    reweighed: bool = False,
) -> World:
    """Plan, precompute and export a pipeline of `pipelines.PIPELINES`, once for a folder.

    Args:
        folder: where all of it goes; what is there already is kept.
        name: of the pipeline.
        targets: to export.
        seed: of the plan and the pictures.
        rank: of the LoRA.
        reweighed: whether the transformer gets other weights, of the seed too.
    """
    from edge_dit.reference.precompute import precompute
    from edge_dit_export.export import export

    world, stored = folder / "bundle" / "manifest.json", folder / "plan.json"
    if not world.is_file():
        if not (folder / "model" / "model_index.json").is_file():
            pipelines.write_pipeline(name, folder / "model")
            if reweighed:
                _shuffle_weights(folder / "model" / "transformer", seed)
        _write_images(folder / "images", seed)
        sizes = {"resolution": 48, "patch": 32, "rank": rank, "alpha": 3, "lr": 1e-3}
        counts = {"steps": 20, "draws": DRAWS, "seed": seed}
        export_keys = f"recompute = true\ntargets = {json.dumps(list(targets))}"
        text = tiny.job(pipelines.SHORT, export_keys, **sizes, **counts)
        (folder / "job.toml").write_text(text)
        job = read_job(folder / "job.toml")
        plan = make_plan(job)
        stored.write_text(plan.model_dump_json())
        images = read_folder(job.data.images, job.data.prompt, plan.s_max)
        precompute(plan, images, folder / "bank")
        export(plan, folder / "bundle", plan.targets)
    plan = Plan.model_validate_json(stored.read_text())
    return World(name, plan, folder / "bank", folder / "bundle")


def _shuffle_weights(folder: Path, seed: int) -> None:
    """Other weights of the same distributions: the numbers of each tensor change places."""
    rng = np.random.default_rng(seed)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    for name, value in sorted(tensors.items()):
        tensors[name] = rng.permuted(value.ravel()).reshape(value.shape)
    save_file(tensors, path, metadata={"format": "pt"})


def _write_images(folder: Path, seed: int) -> None:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(2):
        pixels = rng.integers(0, 255, (48, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "0.txt").write_text(pipelines.LONG)


if __name__ == "__main__":
    make_world(Path(sys.argv[1]), sys.argv[2], tuple(sys.argv[3:]))
