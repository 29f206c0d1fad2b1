"""The loop's parts in a bundle: each graph against torch, and the steps against the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

import pipelines
import tiny
from edge_dit.app import api
from edge_dit.contract import loop
from edge_dit.contract.bundle import Bundle
from edge_dit.contract.names import COND, ENTRY, NEW, STATE
from edge_dit.contract.targets import OnnxFacts
from edge_dit.errors import BadInput
from edge_dit.models.families.family import Family
from edge_dit.models.families.parts.joined import PROMPT_MASK
from edge_dit.models.families.sana import Sana
from edge_dit.models.model import open_model
from edge_dit.models.pipeline import load_pipeline
from edge_dit.models.subgraph import add_lora, lora_modules, lora_name
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import Plan
from edge_dit.store.tensors import TensorFile
from edge_dit_export.export import export
from edge_dit_export.targets.frozen import FrozenStore
from edge_dit_runtime.session import open_session
from edge_dit_runtime.sessions.mapped import MappedTensors
from loops import EXPORT, write_world

TOLERANCE = 1e-5
PAINTED = ("sana", "flux-dev", "sd3.5-medium", "pixart-sigma", "qwen-image")
OTHERS = ("sana-1.5", "flux-schnell", "sd3-medium", "sd3-without-t5", "qwen-image-zero-cond")
NEWER = (
    *("lumina2", "chroma", "flux2-klein", "flux2-klein-distilled", "z-image", "krea-2"),
    "qwen-image-2.1",
)
NAMES = [
    *PAINTED,
    "sana-sprint",
    *(pytest.param(name, marks=pytest.mark.slow) for name in NEWER),
    *(pytest.param(name, marks=pytest.mark.matrix) for name in OTHERS),
]
LIMIT = 40_000
"""Bytes of a file; the largest tensor here has 32,768."""


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
    bundle = api.export(plan, folder / "bundle", ["onnx"], job=job)
    pipeline = load_pipeline(folder / "model")
    return Made(request.param, plan, bundle, pipeline, open_model(folder / "model").family)


def drawn(
    made: Made, grid: tuple[int, int], seed: int = 0
) -> tuple[Tensor, float, dict[str, Tensor]]:
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


def through(
    made: Made, blocks: list[Any], file_of: Any, state: dict[str, Tensor], lora: Any = None
) -> dict[str, Tensor]:
    """The state after all blocks, by their graphs."""
    for block in blocks:
        given = {**state, **{local: lora[name] for local, name in block.lora.items()}}
        given |= {local: state[name] for local, name in block.cond.items()}
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
        for block in made.family.blocks(made.model).items():
            state = made.family.run_block(*block, state, cond, made.plan.grid)
    after = through(made, made.facts.blocks, loop.base_file, found)
    tiny.assert_close({ENTRY: state.image}, after, TOLERANCE)


@pytest.fixture(scope="module")
def painted(made):
    """The stock model with random LoRA on the trained blocks, and that LoRA by name."""
    if made.facts.painting is None:
        pytest.skip("its scheduler's steps are random")
    plan, family = made.plan, made.family
    model = load_pipeline(made.plan.model).transformer
    add_lora(model, lora_modules(family, model, plan.trained, plan.lora_targets), 2, 3.0, seed=7)
    generator = torch.Generator().manual_seed(1)
    lora = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            if "lora_B" in name:
                parameter.data.normal_(std=0.1, generator=generator)
            lora[lora_name(name)] = parameter.detach()
    return model, lora


def test_a_picture_with_an_adapter(made, painted):
    """begin, all blocks and predict, chained, against the stock forward."""
    model, lora = painted
    found, inputs = begun(made, loop.PAINT + loop.BEGIN, made.picture)
    assert sorted(lora) == sorted(n for b in made.facts.paint_blocks for n in b.lora.values())
    after = through(made, made.facts.paint_blocks, loop.paint_file, found, lora)
    prediction = made.part(loop.PREDICT, **after)
    with torch.no_grad():
        want = made.family.learned(made.family.forward(model, inputs))
    tiny.assert_close({loop.PREDICTION: want}, prediction, TOLERANCE)


def test_a_tile_to_latents_and_back(made):
    vae, factor = made.pipeline.vae, made.facts.latents.factor
    assert made.facts.tile > made.plan.s_max > made.plan.s_min  # neither is cut
    tile = made.plan.s_min
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, tile, tile, generator=generator) * 2 - 1
    found = made.part(loop.ENCODER, pixels=pixels)
    with torch.no_grad():
        mean, deviation = made.family.moments(vae, pixels)
    want = {loop.MEAN: mean} if deviation is None else {loop.MEAN: mean, loop.DEVIATION: deviation}
    assert (deviation is not None) == made.facts.latents.samples
    assert mean.shape[2] == tile // factor
    assert list(found) == list(want)
    tiny.assert_close(want, found, TOLERANCE)
    if made.facts.painting is not None:
        side = made.plan.s_max
        raw = torch.randn(1, mean.shape[1], side // factor, side // factor, generator=generator)
        with torch.no_grad():
            picture = made.family.pixels(vae, raw)
        found = made.part(loop.DECODER, latents=raw)
        assert picture.shape == (1, 3, side, side)
        tiny.assert_close({loop.PIXELS: picture}, found, TOLERANCE)


def test_latents_are_shifted_scaled_and_packed_as_the_host_does(made):
    vae, facts = made.pipeline.vae, made.facts.latents
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw, deviation = made.family.moments(vae, pixels)
    normal = torch.randn(raw.shape, generator=torch.Generator().manual_seed(1))
    want = made.family.encode_image(vae, pixels, lambda shape: normal.reshape(shape))
    if facts.samples:
        raw = raw + deviation * normal
    shift, scale = (np.float32(v) for v in (facts.shift, facts.scale))
    found = raw.numpy()
    if not facts.of_tokens:
        found = (found - shift.reshape(1, -1, 1, 1)) * scale.reshape(1, -1, 1, 1)
    if facts.packed:
        _, c, h, w = found.shape
        found = found.reshape(1, c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3, 5)
        found = found.reshape(1, h * w // 4, 4 * c)
    if facts.of_tokens:
        found = (found - shift) * scale
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6)


def made_up(latents: Tensor, call: int) -> Tensor:
    """A prediction that depends on the latents and on the number of the call."""
    return torch.tanh(latents * (0.7 + 0.1 * call)) - 0.2 * latents.flip(-1)


class Predictions:
    """`made_up` in place of a transformer's forward, by the number of the step; of the negative
    prompt by that number + 100. With a variance, where the transformer has one, that means nothing.

    Args:
        config: of the transformer.
        separately: whether the pipeline asks for the negative prompt in a call of its own, after
            the prompt's; otherwise in the first half of a batch.
    """

    def __init__(self, variance: bool, separately: bool) -> None:
        self.variance = variance
        self.separately, self.timesteps, self.calls = separately, [], 0

    def __call__(self, hidden_states: Any, timestep: Tensor, *_: Any, **told: Any) -> tuple[Any]:
        if "img_mask" in told:  # Qwen-Image 2.1's, a token each
            grid = told["img_shapes"][0][0][1:]
            latents = hidden_states.transpose(1, 2).unflatten(-1, grid)
            return (self.predict(latents, timestep).flatten(2).transpose(1, 2),)
        if isinstance(hidden_states, list):  # Z-Image's, of films of one frame, the prompt's first
            films = torch.stack(hidden_states).squeeze(2).flip(0)
            return (list(self.predict(films, timestep).flip(0).unsqueeze(2)),)
        return (self.output(self.predict(hidden_states, timestep)),)

    def output(self, found: Tensor) -> Tensor:
        """What the transformer returns with a prediction."""
        return torch.cat([found, torch.ones_like(found)], dim=1) if self.variance else found

    def predict(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        number = len(self.timesteps)
        self.calls += 1
        if self.separately and self.calls % 2 == 0:
            return made_up(hidden_states, number - 1 + 100)
        self.timesteps.append(float(timestep[0]))
        if len(hidden_states) == 1:
            return made_up(hidden_states, number)
        halves = [made_up(hidden_states[:1], number + 100), made_up(hidden_states[1:], number)]
        return torch.cat(halves)


def predictions_of(made: Made, separately: bool = False) -> Predictions:
    """`Predictions` in place of the transformer of a bundle."""
    config = made.model.config
    return Predictions(config.get("out_channels") == 2 * config.in_channels, separately)


def asks_separately(made: Made) -> bool:
    """Whether the pipeline asks for the negative prompt in a call of its own."""
    guidance = made.facts.painting.guidance
    return guidance == "rescaled" or (
        guidance != "none" and made.family.name in ("chroma", "flux2", "krea2")
    )


def stock_latents(made: Made, start: Tensor, monkeypatch: Any) -> tuple[Tensor, list[float]]:
    """Latents that the stock pipeline ends with, called as for a contact sheet, with `Predictions`;
    the timesteps that these got.
    """
    separately = asks_separately(made)
    predictions = predictions_of(made, separately)
    monkeypatch.setattr(made.model, "forward", lambda *a, **k: predictions(*a, **k))
    found = made.pipeline(
        prompt=pipelines.SHORT,
        height=made.plan.s_max,
        width=made.plan.s_max,
        latents=made.family.pipeline_latents(start, made.picture[0]),
        output_type="latent",
        **made.family.sample_options(made.pipeline, 1),
    ).images
    if made.facts.latents.of_tokens:  # FLUX.2's pipeline gives the autoencoder's
        found = torch.from_numpy(made.facts.latents.scaled(found.numpy()))
    if made.family.name == "qwen_image21":  # its pipeline gives tokens
        found = found.transpose(1, 2).reshape(start.shape)
    return found, predictions.timesteps


def test_recorded_steps_paint_what_the_pipeline_paints(made, monkeypatch):
    painting = made.facts.painting
    if painting is None:
        assert "noise in every step" in made.facts.no_painting
        assert made.facts.paint_blocks == []
        return
    latents, _ = made.family.blank(made.model, made.picture, made.plan.text_tokens)
    start = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    want, timesteps = stock_latents(made, start, monkeypatch)
    entered, guided, shown = [start], [], predictions_of(made).output
    for number, step in enumerate(painting.steps):
        outputs = (made_up(entered[-1], call) for call in (number, number + 100))
        p, u = (made.family.learned(shown(output)) for output in outputs)
        if painting.guidance == "none":
            guided.append(p)
        else:
            guided.append(u + painting.scale * (p - u))
        if painting.guidance == "rescaled":
            ratio = p.norm(dim=-1, keepdim=True) / guided[-1].norm(dim=-1, keepdim=True)
            guided[-1] = guided[-1] * ratio
        terms = [entered[n] * f for n, f in step.latents.items()]
        terms += [guided[n] * f for n, f in step.predictions.items()]
        entered.append(torch.stack(terms).sum(0))
    factor = made.facts.timestep_factor
    handed = made.family.handed(torch.tensor([step.timestep * factor for step in painting.steps]))
    np.testing.assert_allclose(handed, timesteps, 1e-6)
    tiny.assert_close({"latents": want}, {"latents": entered[-1]}, TOLERANCE)


def test_prompts_are_encoded_as_the_pipeline_encodes_them(made):
    facts, tokens = made.facts, made.plan.text_tokens
    captions = [pipelines.SHORT, pipelines.LONG.strip()]
    assert facts.prompts[:2] == captions
    guided = made.family.guides(made.pipeline) and facts.painting
    assert set(facts.negatives) == ({2} if guided else set())
    tables = TensorFile(made.folder / loop.TABLES).read()
    want = made.family.encode_prompts(made.pipeline, captions, tokens)
    if facts.negatives:
        assert facts.negative == 2
        want.append(negative_of_stock(made, tokens))
    for number, prompt in enumerate(want):
        for name, value in prompt.items():
            found = tables[f"{loop.PROMPT}{number}.{name}"]
            np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5)
    levels = tables[loop.LEVELS]
    objective = open_model(made.plan.model).objective
    kept = objective.sigmas if facts.levels.kind == "velocity" else objective.alphas_cumprod
    assert levels.dtype == np.float64
    np.testing.assert_array_equal(levels, kept)


def negative_of_stock(made: Made, tokens: int) -> dict[str, Tensor]:
    """The negative prompt that the stock pipeline passes to its transformer, padded with zeros to
    ``tokens``.
    """
    seen: list[dict[str, Any]] = []

    class Enough(Exception):
        pass

    def forward(hidden_states: Any, *lists: Any, **arguments: Any) -> Any:
        if lists:  # Z-Image's timesteps, and its prompts without padding, the negative one last
            arguments = {"encoder_hidden_states": lists[1][-1].unsqueeze(0)}
        seen.append(arguments)
        if len(seen) == (2 if asks_separately(made) else 1):
            raise Enough
        return (torch.zeros_like(hidden_states),)

    own = made.model.forward
    made.model.forward = forward
    try:
        made.pipeline(
            prompt=pipelines.LONG,
            height=made.plan.s_max,
            width=made.plan.s_max,
            **made.family.sample_options(made.pipeline, 1),
        )
    except Enough:
        pass
    finally:
        made.model.forward = own
    names = made.family.blank(made.model, made.picture, tokens)[1]
    arguments = seen[-1]
    if made.family.name == "krea2":  # padded between the prompt and what follows it
        kept = arguments[PROMPT_MASK][0].bool()
        for name in ("encoder_hidden_states", PROMPT_MASK):
            arguments[name] = arguments[name][:, kept]
    found = {name: arguments.get(name) for name in names}
    length = found["encoder_hidden_states"].shape[1]
    padded = {}
    for name, value in found.items():
        if value is None:  # a mask that the pipeline leaves out where it masks nothing
            value = torch.ones(1, length)
        if name != "pooled_projections":
            missing = tokens - min(tokens, length)
            value = value[:, :tokens]
            value = torch.cat([value, torch.zeros(len(value), missing, *value.shape[2:])], dim=1)
        padded[name] = value[:1].float()
    return padded


def test_graphs_hold_no_weights_and_standard_operators_only(made):
    for file in [*made.facts.graphs, *made.facts.block_graphs]:
        model = onnx.load(made.folder / file)
        onnx.checker.check_model(model, full_check=True)
        assert {entry.domain for entry in model.opset_import} == {""}
        assert (model.opset_import[0].version, model.ir_version) == (18, 10)
        assert sum(len(i.raw_data) for i in model.graph.initializer) < 20_000, file


def test_every_weight_lies_in_the_files_once(made):
    keys = set()
    for block in made.facts.blocks:
        keys |= set(block.weights.values())
    for graph in made.facts.graphs.values():
        keys |= set(graph.weights.values())
    trained = {k for b in made.bundle.facts("onnx").streamed.blocks for k in b.weights.values()}
    assert trained < keys
    assert {k for b in made.facts.paint_blocks for k in b.weights.values()} <= keys
    files = made.bundle.facts("onnx").frozen
    stored = [key for file in files for key in TensorFile(made.folder / file).header.tensors]
    assert sorted(stored) == sorted(set(stored))
    assert keys <= set(stored)


def test_weights_in_several_files_train_the_same(tmp_path, monkeypatch):
    """A small limit: every file keeps it, and the fused graph finds its weights in all of them."""
    job = read_job(write_world(tmp_path, "sana"))
    plan = make_plan(job).model_copy(update={"loop": False})
    whole = export(plan, tmp_path / "whole", ["onnx", "ort-training"])
    monkeypatch.setattr(FrozenStore.__init__, "__defaults__", (LIMIT,))
    split = export(plan, tmp_path / "split", ["onnx", "ort-training"])
    for target, names in (
        ("onnx", split.facts("onnx").frozen),
        ("ort-training", split.facts("ort-training").files),
    ):
        assert len(names) > 2
        assert names[:2] == ["frozen.safetensors", "frozen-1.safetensors"]
        sizes = [(split.folder / target / name).stat().st_size for name in names]
        assert max(sizes) <= LIMIT
        assert {p.name for p in (split.folder / target).glob("frozen*")} == set(names)
    batch = {
        name: np.random.default_rng(0).normal(size=shape).astype(np.float32)
        for name, shape in whole.manifest.shapes("batch").items()
    }
    for target, layout in (("onnx", "fused"), ("onnx", "streamed"), ("ort-training", "fused")):
        one, other = (open_session(bundle, target, layout) for bundle in (whole, split))
        assert [one.step(batch) for _ in range(2)] == [other.step(batch) for _ in range(2)]


def test_a_bundle_of_before_names_one_file():
    facts = OnnxFacts.model_validate({"frozen": "frozen.safetensors", "graphs": {}})
    assert facts.frozen == ["frozen.safetensors"]
    assert facts.loop is None


def test_a_loop_without_its_target_is_refused(tmp_path):
    job = read_job(write_world(tmp_path, "sana", EXPORT.replace('"onnx"', '"ort-training"')))
    with pytest.raises(BadInput, match="onnx among the targets"):
        make_plan(job)


def test_prompts_that_are_too_long_are_refused_at_plan(tmp_path):
    keys = f'targets = ["onnx"]\nloop = true\nprompts = ["{"toy " * 400}"]'
    job = read_job(write_world(tmp_path, "sana", keys))
    with pytest.raises(BadInput, match="at most 300"):
        make_plan(job)
    assert make_plan(
        job.model_copy(update={"export": job.export.model_copy(update={"loop": False})})
    )


def test_a_part_that_torch_cannot_export_is_named(tmp_path, monkeypatch):
    job = read_job(write_world(tmp_path, "sana"))
    plan = make_plan(job)

    def moments(self, vae, pixels):
        return pixels[:, :, : int(pixels.sum())], None

    monkeypatch.setattr(Sana, "moments", moments)
    with pytest.raises(BadInput, match=r"vae_encoder.onnx of the loop: cannot be exported"):
        api.export(plan, tmp_path / "bundle", ["onnx"], job=job)
    assert not (tmp_path / "bundle").exists()


def test_steps_that_are_random_or_not_linear_are_not_written_down(tmp_path):
    from edge_dit.reference.recording import record

    folder = pipelines.write_pipeline("sana", tmp_path / "model")
    pipeline = load_pipeline(folder)
    encode, latents = Sana().encode_prompts, torch.zeros(1, 4, 16, 16)
    prompts = [*encode(pipeline, ["a"], 8), *encode(pipeline, [""], 8)]
    changed = {"algorithm_type": "sde-dpmsolver++"}
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changed)
    assert "random, or not linear" in record(Sana(), pipeline, 64, latents, prompts)
    changed = {"algorithm_type": "dpmsolver++", "thresholding": True}
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changed)
    assert "random, or not linear" in record(Sana(), pipeline, 64, latents, prompts)
    assert "refuses to paint 48" in record(Sana(), pipeline, 48, latents, prompts)
