"""Every family beside its stock pipeline: same prompts, latents, noise, bank and adapter."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import pipelines
from edge_dit.cli import main
from edge_dit.contract.adapter import read_adapter, write_adapter_folder
from edge_dit.contract.adapter_formats import DIFFUSERS, PEFT, format_of
from edge_dit.contract.bank import Bank
from edge_dit.contract.names import read_by
from edge_dit.contract.noise import NOISE, POSTERIOR
from edge_dit.errors import BadInput, ManyFaults
from edge_dit.models.checkpoint import INDEX, SINGLE
from edge_dit.models.families import PIPELINE_FAMILY, family_of
from edge_dit.models.families.family import Family, scheduler_config
from edge_dit.models.families.parts.joined import Joined
from edge_dit.models.families.qwen_image import QwenVae
from edge_dit.models.model import open_model
from edge_dit.models.patch_sampler import PatchSampler
from edge_dit.models.pipeline import load_pipeline
from edge_dit.models.subgraph import add_lora, lora_modules, lora_name
from edge_dit.pictures.dataset import Captioned, read_folder
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import Plan, model_of
from edge_dit.reference.eager import adapted_subgraph, blank_batch
from edge_dit.reference.evaluate import adapted, encode_whole, heldout_loss
from edge_dit.reference.precompute import normal_of, precompute
from pipelines import LONG, PIPELINES, SHORT, SIZE

ONE_EACH = (
    "sana-sprint",
    "flux-dev",
    "sd3.5-medium",
    "pixart-sigma",
    "qwen-image",
    "lumina2",
    "z-image",
    "krea-2",
    "qwen-image-2.1",
)
"""One pipeline of each family and of each class, but SanaPipeline, whose road test_cli walks."""
ONE_SEQUENCE = ("lumina2", "z-image", "krea-2", "qwen-image-2.1")
"""Those whose blocks read one sequence of text and image."""
ALL = pytest.mark.parametrize("name", PIPELINES)
STEPS = 3
WITHOUT_GUIDANCE: dict[str, dict[str, Any]] = {
    "SanaPipeline": {"guidance_scale": 1.0, "use_resolution_binning": False},
    "SanaSprintPipeline": {"use_resolution_binning": False, "intermediate_timesteps": None},
    "FluxPipeline": {"guidance_scale": 3.5, "max_sequence_length": pipelines.TEXT_LIMIT},
    "StableDiffusion3Pipeline": {"guidance_scale": 1.0, "max_sequence_length": 77},
    "PixArtSigmaPipeline": {"guidance_scale": 1.0, "use_resolution_binning": False},
    "QwenImagePipeline": {"true_cfg_scale": 1.0, "max_sequence_length": 512},
    "Lumina2Pipeline": {"guidance_scale": 1.0},
    "ChromaPipeline": {"guidance_scale": 1.0, "max_sequence_length": pipelines.TEXT_LIMIT},
    "Flux2KleinPipeline": {"guidance_scale": 1.0, "max_sequence_length": pipelines.CHAT_LIMIT},
    "ZImagePipeline": {"guidance_scale": 0.0},
    "Krea2Pipeline": {"guidance_scale": 0.0},
    "QwenImage21Pipeline": {"true_cfg_scale": 1.0, "use_kv_cache": False},
}
"""How each pipeline is called: lengths as in the training scripts, no second pass."""


LIMITS = {
    "sana": 300,
    "flux": pipelines.TEXT_LIMIT,
    "sd3": 77,
    "pixart": 300,
    "qwen_image": 512,
    "lumina2": 256,
    "chroma": pipelines.TEXT_LIMIT,
    "flux2": pipelines.CHAT_LIMIT,
    "z_image": 512,
    "krea2": 512,
    "qwen_image21": 8191,
}
"""Family -> most text tokens."""
BEFORE = {"lumina2": 32, "flux2": 17, "z_image": 17, "qwen_image21": 10}
"""Family -> most tokens that its pipeline itself puts before and after a prompt, if not 8."""


@dataclass(frozen=True)
class Stock:
    """A pipeline folder, the pipeline loaded from it, and its family."""

    name: str
    folder: Path
    pipeline: Any
    family: Family

    @property
    def options(self) -> dict[str, Any]:
        return WITHOUT_GUIDANCE[type(self.pipeline).__name__]

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns at `SIZE`."""
        multiple = open_model(self.folder).multiple
        return SIZE[0] // multiple, SIZE[1] // multiple


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Name -> `Stock`, each made once."""
    root = tmp_path_factory.mktemp("pipelines")

    @cache
    def make(name: str) -> Stock:
        folder = pipelines.write_pipeline(name, root / name / "model")
        family = family_of(PIPELINE_FAMILY[PIPELINES[name][0]])
        return Stock(name, folder, load_pipeline(folder), family)

    return make


# ---------------------------------------------------------------- text and inputs


@ALL
@pytest.mark.parametrize("prompt", [SHORT, LONG], ids=["short", "long"])
def test_inputs_are_what_the_pipeline_passes_to_its_transformer(stock, name, prompt):
    made = stock(name)
    tokens = made.family.text_tokens(made.folder, [SHORT, LONG])
    encoded = made.family.encode_prompts(made.pipeline, [prompt], tokens)[0]
    calls = transformer_calls(made, prompt)
    assert len(calls) == STEPS
    for timestep, seen in calls:
        latents = latents_of(seen, seen["hidden_states"])
        found = made.family.inputs(made.pipeline.transformer, latents, timestep, encoded, made.grid)
        assert torch.equal(found["hidden_states"], seen["hidden_states"])
        compare_inputs(made, seen, found, tokens)
        model = made.pipeline.transformer
        with torch.no_grad():
            close(made.family.forward(model, found), stock_output(model, seen))


@ALL
def test_text_length_is_what_the_pipeline_uses(stock, name):
    made = stock(name)
    text, mask = text_names(made)
    lengths = {}
    for prompt in (SHORT, LONG):
        seen = transformer_calls(made, prompt)[0][1]
        padded = mask and seen.get(mask) is not None
        used = int(seen[mask].sum()) if padded else seen[text].shape[1]
        lengths[prompt] = used
        assert made.family.text_tokens(made.folder, [prompt]) == used
        if padded:
            assert seen[mask][0, :used].all(), "padding must come last"
    assert made.family.text_tokens(made.folder, [SHORT, LONG]) == max(lengths.values())
    assert (lengths[SHORT] < lengths[LONG]) == bool(mask)


@ALL
def test_a_prompt_that_would_be_cut_off_is_refused_and_named(stock, name):
    made = stock(name)
    limit = LIMITS[made.family.name] if name != "sd3-without-t5" else pipelines.CLIP_LIMIT
    words = limit
    while refused(made, words):
        words -= 1
    assert words >= limit - BEFORE.get(made.family.name, 8)
    if text_names(made)[1]:
        assert made.family.text_tokens(made.folder, ["toy " * words]) == limit
    with pytest.raises(BadInput) as caught:
        made.family.text_tokens(made.folder, [SHORT, "toy " * (words + 1)])
    fault = caught.value
    assert fault.where.startswith("prompt 'toy toy toy")
    assert fault.found == f"{limit + 1} tokens"
    assert str(limit) in fault.expected
    assert fault.remedy


def refused(made: Stock, words: int) -> bool:
    try:
        made.family.text_tokens(made.folder, ["toy " * words])
    except BadInput:
        return True
    return False


def test_a_prompt_longer_than_planned_is_refused(stock):
    for name in ONE_EACH:
        made = stock(name)
        if text_names(made)[1]:
            tokens = made.family.text_tokens(made.folder, [SHORT])
            with pytest.raises(BadInput, match="the longest prompt when the plan was made"):
                made.family.encode_prompts(made.pipeline, [LONG], tokens)


def text_names(made: Stock) -> tuple[str, str]:
    """Names of a pipeline's text and of its mask, if it masks."""
    mask = {
        "sana": "encoder_attention_mask",
        "pixart": "encoder_attention_mask",
        "qwen_image": "encoder_hidden_states_mask",
        "lumina2": "encoder_attention_mask",
        "z_image": "encoder_attention_mask",
        "krea2": "encoder_attention_mask",
        "qwen_image21": "encoder_hidden_states_mask",
    }
    return "encoder_hidden_states", mask.get(made.family.name, "")


def transformer_calls(
    made: Stock, prompt: str, **options: Any
) -> list[tuple[float, dict[str, Any]]]:
    """(timestep, arguments by name) of every call of the transformer while the pipeline samples;
    the timestep as `Family.inputs` takes it.
    """
    model, calls = made.pipeline.transformer, []
    forward = type(model).forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(forward).bind(model, *args, **kwargs).arguments
        passed = {k: v for k, v in bound.items() if k not in ("self", "return_dict")}
        calls.append(plainly(type(model).__name__, passed))
        return forward(model, *args, **kwargs)

    with patched(model, forward=spy):
        made.pipeline(
            prompt=prompt,
            height=SIZE[0],
            width=SIZE[1],
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **{**made.options, **options},
        )
    times = made.pipeline.scheduler.timesteps[: len(calls)]
    if made.name == "sana-sprint":  # angles of the trigonometric path
        times = 1000 * (torch.sin(times) / (torch.cos(times) + torch.sin(times))).double()
    return list(zip(map(float, times), calls, strict=True))


@contextmanager
def patched(module: Any, **attributes: Any) -> Iterator[None]:
    """An object's own attributes for a while."""
    for name, value in attributes.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name in attributes:
            object.__delattr__(module, name)


def plainly(transformer: str, passed: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments as `Family.inputs` names and arranges them."""
    if transformer == "ZImageTransformer2DModel":
        return unlisted(passed)
    if transformer == "Krea2Transformer2DModel":
        return without_gap(passed)
    return passed


def without_gap(passed: dict[str, Any]) -> dict[str, Any]:
    """Krea 2's text without the padding in its middle. Text has no positions."""
    mask = passed["encoder_attention_mask"]
    gap, places = len(mask[0]) - int(mask.sum()), passed["position_ids"]
    assert not places[: len(mask[0])].any()
    text = passed["encoder_hidden_states"][mask][None]
    kept = {"encoder_hidden_states": text, "encoder_attention_mask": mask[mask][None]}
    return {**passed, **kept, "position_ids": places[gap:]}


def latents_of(seen: dict[str, Any], tokens: Tensor) -> Tensor:
    """Latents as `Family.inputs` takes them. Qwen-Image 2.1's are tokens, and come last."""
    if "img_mask" not in seen:
        return tokens
    grid = seen["img_shapes"][0][0][1:]
    return tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(-1, grid)


def stock_output(model: Any, seen: dict[str, Any]) -> Tensor:
    """The stock forward's output of one of `transformer_calls`."""
    if type(model).__name__ != "ZImageTransformer2DModel":
        return latents_of(seen, model(**seen, return_dict=False)[0])
    film, text = seen["hidden_states"][0].unsqueeze(1), seen["encoder_hidden_states"][0]
    (found,) = model([film], seen["timestep"], [text], return_dict=False)[0]
    return found.squeeze(1).unsqueeze(0)


def unlisted(passed: dict[str, Any]) -> dict[str, Any]:
    """Z-Image's lists of one, by the names of `Family.inputs`."""
    (film,), (text,) = passed.pop("x"), passed.pop("cap_feats")
    timed = {"hidden_states": film.squeeze(1).unsqueeze(0), "timestep": passed.pop("t"), **passed}
    return {**timed, "encoder_hidden_states": text.unsqueeze(0)}


def compare_inputs(made: Stock, seen: dict, found: dict, tokens: int) -> None:
    """Every argument the same; where the family cuts or pads text, the rest is masked padding."""
    text, mask = text_names(made)
    seen, found = dict(seen), dict(found)
    if mask:
        length = seen[text].shape[1]
        used = int(seen[mask].sum()) if seen.get(mask) is not None else length
        assert int(found[mask].sum()) == used
        assert found[mask].shape == (1, tokens)
        assert found[mask][0, :used].all()
        assert torch.equal(found[text][:, :used], seen[text][:, :used])
        if length >= tokens:  # cut: also the padding that is left is the pipeline's
            assert torch.equal(found[text], seen[text][:, :tokens])
        else:
            assert not found[text][:, used:].any()
        if "position_ids" in seen:  # of text none, whatever its length
            image = seen["hidden_states"].shape[1]
            seen, found = (
                {**one, "position_ids": one["position_ids"][-image:]} for one in (seen, found)
            )
        for arguments in (seen, found):
            arguments.pop(text), arguments.pop(mask, None)
            if "img_mask" in arguments:  # text is not in it
                assert not arguments["img_mask"][:, :used].any()
                arguments["img_mask"] = arguments["img_mask"].sum(1)
    for name in sorted(seen.keys() | found.keys()):
        expected, given = seen.get(name), found.get(name)
        if isinstance(expected, Tensor):
            assert given is not None, name
            assert given.shape == expected.shape, name
            assert torch.equal(given.float(), expected.float()), f"{name}: {given} {expected}"
        else:
            assert (given or None) == (expected or None), name


# ---------------------------------------------------------------- pictures


@ALL
def test_encoding_an_image_is_undone_by_the_pipelines_own_decoding(stock, name):
    """The pipeline, given the latents and a scheduler that leaves them alone, hands its autoencoder
    what the autoencoder made of the picture.
    """
    made = stock(name)
    pipeline, vae = made.pipeline, made.pipeline.vae
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(1, 3, *SIZE, generator=generator) * 2 - 1
    posterior = torch.Generator().manual_seed(4)
    latents = made.family.encode_image(vae, pixels, lambda s: torch.randn(s, generator=posterior))
    filmed = isinstance(made.family, QwenVae)
    film = pixels.unsqueeze(2) if filmed else pixels
    if vae.config.get("in_channels") == 4:
        film = torch.cat([film, torch.ones_like(film[:, :1])], dim=1)
    with torch.no_grad():
        raw = vae.encode(film)
        if hasattr(raw, "latent"):
            raw = raw.latent
        else:
            sampled = raw.latent_dist.sample(torch.Generator().manual_seed(4))
            raw = sampled if made.family.samples_posterior else raw.latent_dist.mode()

    decoded = []
    decode = type(vae).decode

    def spy(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        decoded.append(z)
        return decode(vae, z, *args, **kwargs)

    def still(_output: Tensor, _timestep: Any, sample: Tensor, **_kwargs: Any) -> Any:
        return sample, sample

    with patched(vae, decode=spy), patched(pipeline.scheduler, step=still):
        picture = pipeline(
            prompt=SHORT,
            height=SIZE[0],
            width=SIZE[1],
            latents=made.family.pipeline_latents(latents, made.grid[0]),
            num_inference_steps=STEPS,
            output_type="pt",
            **made.options,
        ).images
    assert decoded[0].shape == raw.shape
    torch.testing.assert_close(decoded[0], raw, atol=1e-6, rtol=1e-5)
    # Of what was decoded, not of ``raw``: a decoder makes last bits larger, on some processors too
    # much for the tolerance.
    with torch.no_grad():
        expected = vae.decode(decoded[0], return_dict=False)[0]
    if filmed:
        expected = expected[:, :, 0]
    expected = pipeline.image_processor.postprocess(expected, output_type="pt")
    torch.testing.assert_close(picture, expected, atol=1e-6, rtol=1e-5)
    assert expected.std() > 1e-3
    assert (latents.flatten()[:8] - raw.flatten()[:8]).abs().max() > 1e-3  # they are scaled


@pytest.mark.parametrize("name", ["sana", *ONE_EACH])
def test_sampling_draws_one_picture_a_seed(stock, name):
    made = stock(name)
    twice = made.family.sample(made.pipeline, SHORT, 32, [5, 6])
    again = made.family.sample(made.pipeline, SHORT, 32, [6])
    assert [picture.size for picture in twice] == [(32, 32)] * 2
    first, second = (np.asarray(picture, float) for picture in twice)
    assert np.abs(first - second).max() > 0
    assert np.abs(second - np.asarray(again[0], float)).max() <= 2  # a batch rounds otherwise


# ---------------------------------------------------------------- noise


@ALL
def test_noise_levels_are_the_schedulers(stock, name):
    made = stock(name)
    objective = made.family.objective(scheduler_config(made.folder))
    scheduler = type(made.pipeline.scheduler).from_config(made.pipeline.scheduler.config)
    levels = torch.from_numpy(objective.sigmas)
    assert levels.dtype == torch.float32
    assert (levels.diff() > 0).all()
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        assert torch.equal(levels.flip(0), scheduler.sigmas)
    elif made.family.name == "pixart":
        own = scheduler.alphas_cumprod.double()
        torch.testing.assert_close(torch.from_numpy(objective.alphas_cumprod), own)  # type: ignore[union-attr]
    elif name == "sana-sprint":  # evenly over (0, 1]: an angle t is the level sin / (sin + cos)
        assert torch.equal(levels, torch.arange(1, 1001) / 1000)
    else:
        scheduler.set_timesteps(1000)
        # All levels it can visit, but 1 itself, from which it keeps clear by a hair.
        visited = scheduler.sigmas[1:-1].float()
        torch.testing.assert_close(visited, levels[:-1].flip(0), atol=1e-3, rtol=0)


@ALL
def test_noised_latents_and_timesteps_are_the_schedulers(stock, name):
    made = stock(name)
    objective = made.family.objective(scheduler_config(made.folder))
    scheduler = made.pipeline.scheduler
    if made.family.name == "sana":
        shift = scheduler.config.get("flow_shift", 1.0)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 6, 6, generator=generator)
    for sigma in objective.sigmas[[0, 1, 10, 123, 500, 901, 998, 999]].tolist():
        timestep = objective.timestep(sigma)
        if made.family.name == "pixart":
            scheduler = DDPMScheduler.from_config(made.pipeline.scheduler.config)
            at = torch.tensor([int(timestep)])
            expected = scheduler.add_noise(clean, noise, at)
            assert timestep == round(sigma * 1000) - 1
        else:
            fresh = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
            # The table of another scheduler than Euler's is computed here, in float64.
            apart = (fresh.timesteps - torch.tensor(timestep)).abs()
            assert apart.min() <= (1e-4 if made.family.name == "sana" else 0)
            expected = fresh.scale_noise(clean, fresh.timesteps[apart.argmin()][None], noise)
        found = objective.noised(clean, noise, sigma)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_sd3_levels_are_drawn_as_the_stock_script_draws_them(stock):
    """train_dreambooth_lora_sd3.py: u = sigmoid(N(0, 1)), then the scheduler's table at u."""
    made = stock("sd3-medium")
    objective = made.family.objective(scheduler_config(made.folder))
    generator = torch.Generator().manual_seed(0)
    u = compute_density_for_timestep_sampling(
        "logit_normal", 200_000, logit_mean=0.0, logit_std=1.0, generator=generator
    )
    scheduler = made.pipeline.scheduler
    fresh = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    drawn = fresh.sigmas[(u * 1000).long()]
    shares = np.linspace(0.01, 0.99, 99)
    found = np.array([objective.level(share) for share in shares])
    expected = np.quantile(drawn.numpy(), shares)
    np.testing.assert_allclose(found, expected, atol=0.005)
    assert 0 < objective.level(0.0) < objective.level(0.999999) <= 1


@pytest.mark.parametrize("name", ["sana", "flux-dev", "pixart-sigma", "qwen-image", *ONE_SEQUENCE])
def test_the_other_families_draw_levels_evenly(stock, name):
    made = stock(name)
    objective = made.family.objective(scheduler_config(made.folder))
    assert objective.level(0.0) == objective.sigmas[0]
    assert objective.level(0.5) == objective.sigmas[500]
    assert objective.level(1 - 1e-9) == objective.sigmas[-1]
    assert objective.weight(0.3) is None


def test_sd3_loss_is_that_of_the_predicted_image(stock):
    """train_dreambooth_lora_sd3.py: prediction * (-sigma) + noisy against the clean latents."""
    made = stock("sd3-medium")
    objective = made.family.objective(scheduler_config(made.folder))
    generator = torch.Generator().manual_seed(0)
    clean, noise, output = torch.randn(3, 1, 4, 6, 6, generator=generator)
    for sigma in objective.sigmas[[3, 250, 700, 999]].tolist():
        noisy = objective.noised(clean, noise, sigma)
        expected = torch.nn.functional.mse_loss(output * (-sigma) + noisy, clean)
        ours = torch.nn.functional.mse_loss(output, objective.target(clean, noise))
        weight = objective.weight(sigma)
        assert weight is not None
        torch.testing.assert_close(weight * ours, expected, atol=0, rtol=1e-5)


def test_sprint_turns_a_flow_velocity_into_the_trigonometric_one(stock):
    """What SanaSprintPipeline makes of its network's output: given the flow velocity of a known
    picture and noise, the scheduler finds that picture.
    """
    made = stock("sana-sprint")
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, *made.grid, generator=generator)
    model = made.pipeline.transformer
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def velocity(_latents: Tensor, **_kwargs: Any) -> tuple[Tensor]:
        return (noise - clean,)

    def step(output: Tensor, angle: Tensor, sample: Tensor, **_kwargs: Any) -> Any:
        seen.append((output, angle, sample))
        return sample, sample

    deviation = made.pipeline.scheduler.config.sigma_data
    for angle in (0.4, 0.9, 1.3):
        start = np.cos(angle) * clean + np.sin(angle) * noise
        with (
            patched(model, forward=velocity),
            patched(made.pipeline.scheduler, step=step),
        ):
            made.pipeline(
                prompt=SHORT,
                height=SIZE[0],
                width=SIZE[1],
                latents=start.float(),
                num_inference_steps=1,
                max_timesteps=angle,
                output_type="latent",
                **made.options,
            )
        found, told, sample = seen.pop()
        assert float(told) == pytest.approx(angle)
        torch.testing.assert_close(sample, start.float() * deviation)
        expected = deviation * (np.cos(angle) * noise - np.sin(angle) * clean)
        torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- the road

JOB = """
[model]
path = "model"
[data]
images = "images"
prompt = "{prompt}"
[plan]
head_skip = 1
tail_skip = 1
[train]
resolution = 48
patch = 32
rank = 2
alpha = 3
lr = 0.05
steps = 3
draws = 4
seed = 3
[export]
targets = ["onnx"]
"""


def job_of(made: Stock) -> str:
    """`JOB`, with the smallest resolution from 48 on that the model takes."""
    step = open_model(made.folder).size_step
    return JOB.format(prompt=SHORT).replace("= 48", f"= {-(-48 // step) * step}")


@dataclass(frozen=True)
class Road:
    """A job of a pipeline, planned and precomputed."""

    stock: Stock
    job: Path
    plan: Plan
    images: list[Captioned]
    bank: Path


@pytest.fixture(scope="module")
def road(stock):
    """Name -> `Road`, each made once: two pictures, with prompts of different length."""

    @cache
    def make(name: str) -> Road:
        made = stock(name)
        folder = made.folder.parent
        write_images(folder / "images")
        (folder / "job.toml").write_text(job_of(made))
        job = read_job(folder / "job.toml")
        plan = make_plan(job)
        images = read_folder(job.data.images, job.data.prompt, plan.s_max)
        precompute(plan, images, folder / "bank")
        return Road(made, folder / "job.toml", plan, images, folder / "bank")

    return make


def write_images(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(2):
        pixels = rng.integers(0, 255, (48, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "0.txt").write_text(LONG)


@ALL
def test_a_bank_holds_what_hooks_on_the_stock_transformer_see(road, name):
    made = road(name)
    plan, family, pipeline = made.plan, made.stock.family, made.stock.pipeline
    bank = Bank(made.bank)
    objective = family.objective(scheduler_config(made.stock.folder))
    sampler = PatchSampler(plan.crop_rule)
    assert {draw.prompt for draw in bank.index.draws} == {0, 1}
    for number, draw in enumerate(bank.index.draws):
        pixels = torch.from_numpy(made.images[draw.image].pixels)[None]
        patch = sampler(pixels, torch.tensor([draw.sigma]), torch.tensor([draw.u, draw.v]))
        posterior = partial(normal_of, draw.seed, POSTERIOR)
        clean = family.encode_image(pipeline.vae, patch, posterior)
        noise = normal_of(draw.seed, NOISE, tuple(clean.shape))
        noised = objective.noised(clean, noise, draw.sigma)
        prompt = bank.index.prompts[draw.prompt]
        assert prompt == (LONG.strip(), SHORT)[draw.image]
        encoded = family.encode_prompts(pipeline, [prompt], plan.text_tokens)[0]
        timestep = objective.timestep(draw.sigma)
        inputs = family.inputs(pipeline.transformer, noised, timestep, encoded, plan.grid)
        states, calls, output = watched_forward(family, pipeline.transformer, inputs)

        stored = {k: torch.from_numpy(v) for k, v in bank[number].items()}
        close(stored["entry"], states[1][0])
        close(stored["tail_residual"], states[4][0] - states[3][0])
        if states[1][1] is not None:
            seen = states[1][1].shape[1]  # padding is dropped where the stock forward drops it
            close(stored["entry_text"][:, :seen], states[1][1])
            assert seen == stored["entry_text"].shape[1] or isinstance(family, Joined)
            assert not stored["entry_text"][:, seen:].any()
        close(stored["target"], objective.target(clean, noise))
        weight = objective.weight(draw.sigma)
        assert ("weight" in stored) == (weight is not None)
        if weight is not None:
            assert float(stored["weight"]) == pytest.approx(weight)
        cond = {k[5:]: v for k, v in stored.items() if k.startswith("cond.")}
        second = list(family.blocks(pipeline.transformer))[1]
        for key, value in family.arguments(read_by(second, cond), plan.grid).items():
            compare_arguments(key, value, calls[1][key])
        with torch.no_grad():
            tail = stored["tail_residual"] + states[3][0]
            close(family.head(pipeline.transformer, tail, cond, plan.grid), output)


def watched_forward(
    family: Family, model: Any, inputs: dict[str, Any]
) -> tuple[list[tuple[Tensor, Tensor | None]], list[dict[str, Any]], Tensor]:
    """States (image, text) before every block and after the last, the arguments of every block, and
    the output of the stock forward.
    """
    states: list[tuple[Tensor, Tensor | None]] = []
    calls: list[dict[str, Any]] = []

    def before(block: Any, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments
        calls.append(bound)
        text = bound.get("encoder_hidden_states") if family.joint else None
        states.append(parted(bound[family.streams[-1]], text))

    def after(_block: Any, _args: Any, output: Any) -> None:
        # SD3's last block gives no text back: None, which is no sequence to part
        text, image = output if isinstance(output, tuple) else (None, None)
        states.append(parted(output) if image is None else (image, text))

    def parted(image: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if isinstance(family, Joined):
            return family.part(image, family.image_tokens(model, inputs))
        if text is None and family.joint:  # a single-stream block got one sequence
            count = inputs["encoder_hidden_states"].shape[1]
            return image[:, count:], image[:, :count]
        return image, text if family.joint else None

    blocks = list(family.blocks(model).values())
    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(after))
    with torch.no_grad():
        output = family.forward(model, inputs)
    for handle in handles:
        handle.remove()
    return states, calls, output


def compare_arguments(name: str, found: Any, expected: Any) -> None:
    if isinstance(expected, tuple):
        for one, other in zip(found, expected, strict=True):
            compare_arguments(name, one, other)
    elif isinstance(expected, Tensor):
        if expected.dtype == torch.complex128:  # a bank stores float32
            expected = expected.to(torch.complex64)
        assert found.dtype == expected.dtype, name
        close(found, expected)
    else:
        assert found == expected, name


def close(found: Tensor, expected: Tensor | None) -> None:
    assert expected is not None
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_precompute_again_gives_the_same_bytes(road, tmp_path):
    for name in ONE_EACH:
        made = road(name)
        precompute(made.plan, made.images, tmp_path / name)
        for path in sorted(made.bank.iterdir()):
            assert path.read_bytes() == (tmp_path / name / path.name).read_bytes(), path.name


def test_a_blank_draw_has_the_form_of_the_banks(road):
    """No weight is read for it, and what a bank's draws hold is there, in the same shapes."""
    for name in ONE_EACH:
        made = road(name)
        blank = blank_batch(made.plan, open_model(made.plan.model))
        stored = Bank(made.bank)[0]
        assert {n: tuple(t.shape) for n, t in blank.items()} == {
            n: value.shape for n, value in stored.items()
        }, name
        assert all(t.device.type == "cpu" and not t.any() for t in blank.values() if t.ndim > 1)


@pytest.mark.parametrize("name", ONE_SEQUENCE)
def test_an_adapter_loads_into_the_stock_pipeline(stock, name, tmp_path):
    """Every key, at the strength that it was trained with: random LoRA, without a training."""
    made = stock(name)
    family, model = made.family, open_model(made.folder).checkpoint().model(range(4))
    generator = torch.Generator().manual_seed(0)
    latents, prompt = family.blank(model, made.grid, 5)
    latents = torch.randn(latents.shape, generator=generator)
    inputs = family.inputs(model, latents, 321.0, prompt, made.grid)
    plain = family.forward(model, inputs)
    add_lora(model, lora_modules(family, model, range(4), family.lora_targets), 2, 3.0, seed=0)
    lora = {}
    for key, value in model.named_parameters():
        if "lora_B" in key:
            value.data.normal_(std=0.3, generator=generator)
        if "lora_" in key:
            lora[lora_name(key)] = value.detach().numpy()
    write_adapter_folder(tmp_path, lora, 2, 3.0, "model", DIFFUSERS)
    pipeline = pipelines.load_stock(made.folder)
    pipeline.load_lora_weights(tmp_path)
    loaded = [n for n, m in pipeline.transformer.named_modules() if isinstance(m, BaseTunerLayer)]
    assert len(loaded) == len(lora) / 2 == 4 * len(family.lora_targets)
    with torch.no_grad():
        found = family.forward(pipeline.transformer, inputs)
        close(found, family.forward(model, inputs))
    assert (found - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ONE_EACH and name not in ONE_SEQUENCE
        else pytest.param(name, marks=pytest.mark.slow)
        for name in PIPELINES
    ],
)
def test_what_is_trained_loads_into_the_stock_pipeline(road, name, run, tmp_path):
    """Export, train and write the adapter by the command line; the stock pipeline with it is our
    sub-graph with it.
    """
    made = road(name)
    plan, family = made.plan, made.stock.family
    plan_file, bundle, lora = tmp_path / "plan.json", tmp_path / "bundle", tmp_path / "lora"
    plan_file.write_text(plan.model_dump_json())
    run("export", made.job, "--plan", plan_file, "-o", bundle)
    run("train", bundle, "--bank", made.bank, "-o", tmp_path / "run")
    facts = json.loads(run("adapter", tmp_path / "run", "-o", lora, "--json"))
    peft_only = format_of(family.name) == PEFT
    assert facts["path"] == str(lora / (PEFT if peft_only else DIFFUSERS).file)
    assert facts["load"] in run("adapter", tmp_path / "run", "-o", lora)

    pipeline = pipelines.load_stock(
        made.stock.folder,
        **({"text_encoder_3": None, "tokenizer_3": None} if name == "sd3-without-t5" else {}),
    )
    exec(facts["load"], {"pipe": pipeline})  # the printed line is all a user needs
    assert hasattr(pipeline, "load_lora_weights") != peft_only
    model = pipeline.transformer.get_base_model() if peft_only else pipeline.transformer

    subgraph, _ = adapted_subgraph(plan, model_of(plan))
    ours = subgraph.lora_parameters()
    trained, rank, alpha = read_adapter(tmp_path / "run" / "adapter.safetensors")
    assert rank != alpha  # so that a scale that is lost, or applied twice, shows
    with_trained(subgraph, model, trained)
    assert facts["tensors"] == len(trained)
    assert any(p.abs().max() > 1e-3 for k, p in ours.items() if "lora_B" in k)

    bank = Bank(made.bank)
    objective = family.objective(scheduler_config(made.stock.folder))
    draw = bank.index.draws[0]
    encoded = family.encode_prompts(
        made.stock.pipeline, [bank.index.prompts[draw.prompt]], plan.text_tokens
    )[0]
    latents, _ = family.blank(model, plan.grid, plan.text_tokens)
    latents = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    inputs = family.inputs(model, latents, objective.timestep(0.3), encoded, plan.grid)
    states, _, expected = watched_forward(family, model, inputs)
    with torch.no_grad():
        plain = family.forward(made.stock.pipeline.transformer, inputs)
        state, cond = family.begin(made.stock.pipeline.transformer, inputs)
        first = next(iter(family.blocks(made.stock.pipeline.transformer).items()))
        state = family.run_block(*first, state, cond, plan.grid)
        batch = {"entry": state.image, "entry_text": state.text}
        batch |= {f"cond.{key}": value for key, value in cond.items()}
        batch["tail_residual"] = states[4][0] - states[3][0]
        found = subgraph.predict(batch)
    assert (found - expected).abs().max() <= 1e-5
    assert (expected - plain).abs().max() > 1e-3


def with_trained(subgraph: Any, model: Any, trained: dict[str, np.ndarray]) -> None:
    """Give the sub-graph the LoRA of the run; ``model`` must carry every tensor of it."""
    layers = {k: m for k, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    loaded = {
        f"transformer.{name}.{part}.weight"
        for name, layer in layers.items()
        for part in ("lora_A", "lora_B")
        for adapter in layer.active_adapters
    }
    ours = subgraph.lora_parameters()
    assert len(layers) == len(trained) / 2
    assert loaded == ours.keys() == trained.keys()
    everything = subgraph.family.blocks(model)
    carrying = [name for name in everything if any(k.startswith(f"{name}.") for k in layers)]
    assert carrying == list(everything)[1:3]
    for name, value in trained.items():
        ours[name].data.copy_(torch.from_numpy(value))


def test_an_adapter_comes_and_goes(road, tmp_path):
    """Held-out loss with LoRA as `edge-dit adapter` writes it, then without: as it was."""
    for name in ("flux-dev", "pixart-sigma"):
        made = road(name)
        plan, pipeline = made.plan, made.stock.pipeline
        model = model_of(plan)
        images = encode_whole(plan, model, pipeline, made.images[:1])
        before = heldout_loss(model, pipeline, images)
        subgraph, _ = adapted_subgraph(plan, model)
        rng = np.random.default_rng(0)
        tensors = {
            key: rng.normal(0, 0.3, tuple(value.shape)).astype(np.float32)
            for key, value in subgraph.lora_parameters().items()
        }
        for form in dict.fromkeys((format_of(plan.family).name, "diffusers")):
            folder = tmp_path / f"{name}-{form}"
            chosen = {"diffusers": DIFFUSERS, "peft": PEFT}[form]
            write_adapter_folder(folder, tensors, plan.rank, plan.alpha, "model", chosen)
            with adapted(pipeline, folder):
                assert abs(heldout_loss(model, pipeline, images) - before) > 1e-4
            assert heldout_loss(model, pipeline, images) == before
            assert not any(isinstance(m, BaseTunerLayer) for m in pipeline.transformer.modules())


# ---------------------------------------------------------------- bad input


@pytest.fixture
def copied(stock, tmp_path):
    """A folder with a job and a pipeline to spoil; what makes its plan."""

    def make(name: str, **replaced: str) -> Path:
        shutil.copytree(stock(name).folder, tmp_path / "model")
        write_images(tmp_path / "images")
        text = job_of(stock(name))
        for old, new in replaced.items():
            text = text.replace(f"{old} =", f"{new}\n#")
        (tmp_path / "job.toml").write_text(text)
        return tmp_path

    return make


def refusal(folder: Path) -> BadInput:
    """The fault that planning and precomputing the job of ``folder`` ends with; the bank must not
    be there, not even in part.
    """
    job = read_job(folder / "job.toml")
    before = sorted(folder.iterdir())
    try:
        plan = make_plan(job)
        images = read_folder(job.data.images, job.data.prompt, plan.s_max)
        precompute(plan, images, folder / "bank")
    except BadInput as fault:
        assert sorted(folder.iterdir()) == before
        return fault
    raise AssertionError("nothing was refused")


def reshard(folder: Path) -> list[Path]:
    """Split the transformer of a pipeline folder into shards; their files."""
    transformer = folder / "transformer"
    model = pipelines.load_stock(folder).transformer
    shutil.rmtree(transformer)
    model.save_pretrained(transformer, max_shard_size="60KB")
    shards = sorted(transformer.glob("*.safetensors"))
    assert len(shards) > 2
    assert (transformer / INDEX).is_file()
    return shards


def test_an_unsupported_pipeline_names_the_supported_ones(copied):
    folder = copied("flux-dev")
    index = folder / "model" / "model_index.json"
    for name, why in (("StableDiffusionPipeline", ""), ("HunyuanDiTPipeline", "long skips")):
        index.write_text(index.read_text().replace("FluxPipeline", name))
        fault = refusal(folder)
        assert fault.where == str(index)
        assert name in fault.found
        assert why in fault.found
        assert all(supported in fault.expected for supported in PIPELINE_FAMILY)
        assert fault.remedy
        index.write_text(index.read_text().replace(name, "FluxPipeline"))


@pytest.mark.parametrize("name", ONE_EACH)
def test_shards_give_the_same_bank_as_one_file(road, name, tmp_path):
    made = road(name)
    shutil.copytree(made.stock.folder, tmp_path / "model")
    reshard(tmp_path / "model")
    folder = tmp_path / "model"
    whole, sharded = (open_model(f).checkpoint() for f in (made.stock.folder, folder))
    numbers = range(len(whole.names))
    one, other = (checkpoint.model(numbers).state_dict() for checkpoint in (whole, sharded))
    stock_state = made.stock.pipeline.transformer.state_dict()
    assert one.keys() == other.keys() == stock_state.keys()
    for key, value in stock_state.items():
        assert torch.equal(one[key], value), key
        assert torch.equal(other[key], value), key


@pytest.mark.parametrize("name", ONE_EACH)
def test_half_precision_on_disk_is_float32_in_use(stock, name, tmp_path):
    """As large checkpoints are published; the same numbers as diffusers' own loading in float32."""
    made = stock(name)
    half = pipelines.load_stock(made.folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "model")
    pipeline = load_pipeline(tmp_path / "model")
    checkpoint = open_model(tmp_path / "model").checkpoint()
    found = checkpoint.model(range(len(checkpoint.names))).state_dict()
    for key, value in pipeline.transformer.state_dict().items():
        assert found[key].dtype == value.dtype == torch.float32, key
        assert torch.equal(found[key], value), key
    assert any(
        (found[key] != value).any() for key, value in made.pipeline.transformer.state_dict().items()
    )
    tokens = made.family.text_tokens(tmp_path / "model", [SHORT])
    encoded = made.family.encode_prompts(pipeline, [SHORT], tokens)[0]
    assert {value.dtype for value in encoded.values()} == {torch.float32}
    pixels = torch.zeros(1, 3, *SIZE)
    latents = made.family.encode_image(pipeline.vae, pixels, torch.zeros)
    assert latents.dtype == torch.float32


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_damaged_checkpoint_is_refused(copied, name):
    """A missing shard, an index that names absent tensors, a cut-off file, a wrong shape."""
    folder = copied(name)
    transformer = folder / "model" / "transformer"
    shards = reshard(folder / "model")
    index = transformer / INDEX

    held = shards[1].read_bytes()
    shards[1].unlink()
    fault = refusal(folder)
    assert fault.where == str(transformer)
    assert shards[1].name in fault.found
    assert fault.expected
    assert fault.remedy == "finish the download"

    shards[1].write_bytes(held[: len(held) // 2])
    fault = refusal(folder)
    assert fault.where == str(shards[1])
    assert "damaged" in fault.found
    assert fault.remedy
    shards[1].write_bytes(held)

    text = index.read_text()
    told = json.loads(text)
    key = next(key for key, file in told["weight_map"].items() if file == shards[1].name)
    told["weight_map"][key] = shards[0].name
    index.write_text(json.dumps(told))
    fault = refusal(folder)
    assert fault.where == str(index)
    assert key in fault.found
    assert shards[0].name in fault.found
    assert fault.remedy

    del told["weight_map"][key]
    index.write_text(json.dumps(told))
    fault = refusal(folder)
    assert key in fault.found
    assert "no file" in fault.found
    for broken in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(broken)
        assert "unreadable" in refusal(folder).found
    index.write_text(text)

    tensors = load_file(shards[1])
    key = next(key for key, value in tensors.items() if value.ndim == 2)
    save_file({**tensors, key: tensors[key][:-1].contiguous()}, shards[1])
    fault = refusal(folder)
    assert fault.where == str(shards[1])
    assert key in fault.found
    assert str(list(tensors[key].shape)) in fault.expected


def test_no_weights_at_all(copied):
    folder = copied("flux-dev")
    (folder / "model" / "transformer" / SINGLE).unlink()
    fault = refusal(folder)
    assert "no weights" in fault.found
    assert SINGLE in fault.expected


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_missing_part_is_named(copied, name):
    folder = copied(name)
    index = json.loads((folder / "model" / "model_index.json").read_text())
    lists = {part: kind for part, kind in index.items() if isinstance(kind, list)}
    parts = [part for part, kind in lists.items() if all(isinstance(v, str) for v in kind)]
    texts = [part for part in parts if part.startswith(("tokenizer", "processor"))]
    assert {"transformer", "vae", "text_encoder", "scheduler"} <= set(parts)
    assert texts
    for part in parts:
        (folder / "model" / part).rename(folder / "aside")
        fault = refusal(folder)
        assert part in str(fault)
        assert fault.found
        assert fault.expected
        assert fault.remedy
        (folder / "aside").rename(folder / "model" / part)
        # transformers would make up a tokenizer that knows no word
        if part in texts:
            (folder / "model" / part / "tokenizer.json").rename(folder / "aside")
            fault = refusal(folder)
            assert fault.where == str(folder / "model" / part)
            assert "no vocabulary" in fault.found
            (folder / "aside").rename(folder / "model" / part / "tokenizer.json")


NEAR = {
    "sana-sprint": ("attn1.to_qq", "attn1.to_q"),
    "flux-dev": ("attn.add_q_prj", "attn.add_q_proj"),
    "sd3.5-medium": ("attn2.toq", "attn2.to_q"),
    "pixart-sigma": ("ff.net.0.poj", "ff.net.0.proj"),
    "qwen-image": ("img_mlp.net.0.poj", "img_mlp.net.0.proj"),
    "lumina2": ("feed_forward.linear1", "feed_forward.linear_1"),
    "z-image": ("attention.to_qq", "attention.to_q"),
    "krea-2": ("attn.to_gte", "attn.to_gate"),
    "qwen-image-2.1": ("img_mlp.gate_lyer", "img_mlp.gate_layer"),
}


@pytest.mark.parametrize("name", ONE_EACH)
def test_lora_targets_that_match_nothing_are_named_with_near_misses(copied, name):
    wrong, right = NEAR[name]
    fault = refusal(copied(name, lr=f'lora_targets = ["{wrong}"]\nlr = 1e-3'))
    assert fault.where == "train.lora_targets"
    assert wrong in fault.found
    assert right in fault.expected
    assert right in fault.remedy


@pytest.mark.parametrize("name", ONE_EACH)
def test_sizes_must_divide(copied, name):
    fault = refusal(copied(name, patch="patch = 30", resolution="resolution = 49"))
    multiple = {"sana-sprint": 4, "lumina2": 16, "qwen-image-2.1": 32}.get(name, 8)
    assert isinstance(fault, ManyFaults)
    where = [one.where for one in fault.faults]
    assert where == ["train.patch", "train.resolution"]
    for one, below in zip(fault.faults, (30, 49), strict=True):
        assert f"multiple of {multiple}" in one.expected
        assert str(max(1, below // multiple) * multiple) in one.remedy


def test_a_text_only_module_of_the_last_block_alone_is_no_target(copied):
    """Nothing that is trained reads it, so a job that names nothing else trains nothing."""
    replaced = {
        "lr": 'lora_targets = ["attn.to_add_out"]\nlr = 1e-3',
        "tail_skip": "tail_skip = 2",  # leaves one block, the last double one
    }
    fault = refusal(copied("flux-dev", **replaced))
    assert fault.where == "train.lora_targets"
    assert "feed only its text output" in fault.found
    assert fault.remedy


def test_images_that_are_none(copied):
    folder = copied("qwen-image")
    (folder / "images" / "1.png").write_bytes(b"not a picture")
    fault = refusal(folder)
    assert "1.png" in str(fault)
    shutil.rmtree(folder / "images")
    (folder / "images").mkdir()
    assert str(folder / "images") in str(refusal(folder))


def test_pixart_as_it_was_published(stock, road, tmp_path):
    """Its configuration names Transformer2DModel and settings of that class."""
    made = road("pixart-sigma")
    folder = tmp_path / "model"
    shutil.copytree(made.stock.folder, folder)
    config = folder / "transformer" / "config.json"
    settings = json.loads(config.read_text())
    settings |= {"_class_name": "Transformer2DModel", "only_cross_attention": False}
    settings |= {"sample_size": 128, "num_vector_embeds": None, "upcast_attention": False}
    del settings["use_additional_conditions"]
    config.write_text(json.dumps(settings))
    index = folder / "model_index.json"
    named = json.loads(index.read_text())
    index.write_text(json.dumps({**named, "transformer": ["diffusers", "Transformer2DModel"]}))
    skeleton = open_model(folder).checkpoint().skeleton()
    assert type(skeleton).__name__ == "PixArtTransformer2DModel"
    pipeline = load_pipeline(folder, transformer=skeleton)
    encoded = made.stock.family.encode_prompts(pipeline, [SHORT], 8)[0]
    expected = made.stock.family.encode_prompts(made.stock.pipeline, [SHORT], 8)[0]
    for key, value in expected.items():
        assert torch.equal(encoded[key], value)
    settings["use_additional_conditions"] = True
    config.write_text(json.dumps(settings))
    with pytest.raises(BadInput, match="passes no resolution"):
        made.stock.family.config(folder)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line that must succeed; its output."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["edge-dit", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        assert not caught.value.code, captured.err
        return captured.out

    return call
