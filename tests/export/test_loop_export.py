"""The loop's parts in a bundle: each graph against torch, and the steps against the scheduler."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor

import pipelines
import tiny
from edge_dit.contract import loop
from edge_dit.contract.bundle import Bundle
from edge_dit.contract.names import COND, ENTRY, ENTRY_TEXT, NEW, STATE
from edge_dit.errors import BadInput
from edge_dit.models.families.family import Family, State
from edge_dit.models.model import open_model
from edge_dit.models.pipeline import load_pipeline
from edge_dit.models.subgraph import add_lora, lora_modules
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import Plan
from edge_dit.planning.prompts import LoopPrompts, loop_prompts
from edge_dit.store.tensors import TensorFile
from edge_dit_export.export import export
from edge_dit_export.targets.frozen import FrozenStore
from edge_dit_runtime.sessions.mapped import MappedTensors

TOLERANCE = 1e-5
PAINTED = ("sana", "flux-dev", "sd3.5-medium", "pixart-sigma", "qwen-image")
OTHERS = ("sana-1.5", "flux-schnell", "sd3-medium", "sd3-without-t5", "qwen-image-zero-cond")
NAMES = [*PAINTED, "sana-sprint", *(pytest.param(name, marks=pytest.mark.matrix) for name in OTHERS)]
EXPORT = f"""
targets = ["onnx"]
loop = true
prompts = [{json.dumps(pipelines.LONG)}]
"""


def write_world(folder: Path, name: str, export_keys: str = EXPORT, **train: object) -> Path:
    """A pipeline, two pictures and a job; the job's path."""
    pipelines.write_pipeline(name, folder / "model")
    (folder / "images").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 70, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    sizes = {"resolution": 64, "patch": 32, "rank": 2, "alpha": 3, "seed": 3, **train}
    (folder / "job.toml").write_text(tiny.job(pipelines.SHORT, export_keys, **sizes))
    return folder / "job.toml"


@dataclass(frozen=True)
class Made:
    """An exported loop bundle beside the pipeline that it was made of."""

    name: str
    plan: Plan
    bundle: Bundle
    pipeline: Any = field(repr=False)
    family: Family = field(repr=False)

    @cached_property
    def facts(self) -> loop.LoopFacts:
        found = self.bundle.facts("onnx").loop
        assert found is not None
        return found

    @cached_property
    def folder(self) -> Path:
        return self.bundle.folder / "onnx"

    @cached_property
    def frozen(self) -> MappedTensors:
        return MappedTensors(*(self.folder / file for file in self.bundle.facts("onnx").frozen))

    @property
    def model(self) -> Any:
        return self.pipeline.transformer

    @cached_property
    def picture(self) -> tuple[int, int]:
        side = self.plan.s_max // self.plan.multiple
        return side, side

    def run(self, file: str, inputs: dict[str, Any], weights: dict[str, str]) -> dict[str, Tensor]:
        """A graph's results by name."""
        names = {**self.facts.graphs, **self.facts.block_graphs}[file]
        given = {**inputs, **{local: self.frozen[key] for local, key in weights.items()}}
        session = onnxruntime.InferenceSession(self.folder / file)
        assert [value.name for value in session.get_inputs()] == names.inputs
        results = session.run(names.outputs, {name: as_array(given[name]) for name in names.inputs})
        return {n: torch.from_numpy(v) for n, v in zip(names.outputs, results, strict=True)}

    def part(self, file: str, **inputs: Any) -> dict[str, Tensor]:
        return self.run(file, inputs, self.facts.graphs[file].weights)


def as_array(value: Any) -> np.ndarray:
    return value.detach().numpy() if isinstance(value, Tensor) else value


@pytest.fixture(scope="module", params=NAMES)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    job = read_job(write_world(folder, request.param))
    plan = make_plan(job)
    bundle = export(plan, folder / "bundle", ["onnx"], prompts=loop_prompts(job))
    pipeline = load_pipeline(folder / "model")
    return Made(request.param, plan, bundle, pipeline, open_model(folder / "model").family)


def drawn(made: Made, grid: tuple[int, int], seed: int = 0) -> tuple[Tensor, float, dict[str, Tensor]]:
    """Random latents and prompt, and a timestep of the scheduler."""
    latents, prompt = made.family.blank(made.model, grid, made.plan.text_tokens)
    generator = torch.Generator().manual_seed(seed)
    for name, value in prompt.items():
        if name.endswith("mask"):
            value[:, -2:] = 0
        else:
            prompt[name] = torch.randn(value.shape, generator=generator)
    return torch.randn(latents.shape, generator=generator), 321.0, prompt


def begun(made: Made, file: str, grid: tuple[int, int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What begin.onnx makes of `drawn`, and the stock forward's arguments of the same."""
    latents, timestep, prompt = drawn(made, grid)
    scaled = np.array([timestep * made.facts.timestep_factor], np.float32)
    named = {loop.PROMPT + name: value for name, value in prompt.items()}
    found = made.part(file, latents=latents, timestep=scaled, **named)
    return found, made.family.inputs(made.model, latents, timestep, prompt, grid)


def through(made: Made, blocks: list[Any], file_of: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state after all blocks, by their graphs."""
    lora = made.lora if hasattr(made, "lora") else {}
    for block in blocks:
        given = {**state, **{local: lora[name] for local, name in block.lora.items()}}
        after = made.run(file_of(block.kind), given, block.weights)
        state = {**state, **{name.removeprefix(NEW): value for name, value in after.items()}}
    return state


@pytest.mark.parametrize("file", [loop.BEGIN, loop.PAINT + loop.BEGIN])
def test_begin(made, file):
    if file not in made.facts.graphs:
        assert made.name == "sana-sprint"
        return
    grid = made.plan.grid if file == loop.BEGIN else made.picture
    found, inputs = begun(made, file, grid)
    state, cond = made.family.begin(made.model, inputs)
    want = {name: value for name, value in zip(STATE, state, strict=True) if value is not None}
    want |= {COND + name: value for name, value in cond.items()}
    assert list(found) == list(want)
    tiny.assert_close(want, found, TOLERANCE)


def test_all_blocks_at_a_patch(made):
    found, inputs = begun(made, loop.BEGIN, made.plan.grid)
    state, cond = made.family.begin(made.model, inputs)
    assert len(made.facts.blocks) == made.plan.layers
    with torch.no_grad():
        for block in made.family.blocks(made.model).values():
            state = made.family.run_block(block, state, cond, made.plan.grid)
    after = through(made, made.facts.blocks, loop.base_file, found)
    tiny.assert_close({ENTRY: state.image}, after, TOLERANCE)
