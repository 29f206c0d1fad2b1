"""Every key of every family's configurations is implemented, or refused by its name at plan."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_families as contract
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

import bundles
import pipelines
import variants
from edge_dit.cli import main
from edge_dit.errors import BadInput, ManyFaults
from edge_dit.models.checkpoint import meta_model
from edge_dit.models.families import FAMILIES, PIPELINE_FAMILY, family_of
from edge_dit.models.families.parts.switches import DEEPEST, LARGEST, WIDEST, defaults_of
from edge_dit.models.public_configs import CONFIGS
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit_runtime.session import open_session
from variants import GRID, TEXT, VARIANTS

BASE = {
    "sana": "sana",
    "flux": "flux-dev",
    "sd3": "sd3-medium",
    "pixart": "pixart-sigma",
    "qwen_image": "qwen-image",
    "lumina2": "lumina2",
    "chroma": "chroma",
    "flux2": "flux2-klein",
    "z_image": "z-image",
    "krea2": "krea-2",
    "qwen_image21": "qwen-image-2.1",
}
"""Family -> the variant whose configuration the tests change."""
RETIRED = {"qwen_image": {"pooled_projection_dim"}}
"""Keys of published configurations that no class of diffusers has."""

IMPLEMENTED: list[tuple[str, dict[str, Any]]] = [
    ("sana", {"attention_bias": True}),
    ("sana", {"norm_elementwise_affine": True, "norm_eps": 1e-3}),
    ("sana", {"interpolation_scale": 2.0}),
    ("sana", {"interpolation_scale": 1, "patch_size": 2}),
    ("sana", {"qk_norm": "layer_norm_across_heads"}),
    ("sana", {"mlp_ratio": 1.3, "timestep_scale": 0.001}),
    ("sana", {"num_cross_attention_heads": 3, "cross_attention_head_dim": 8}),
    ("sana", {"patch_size": 3, "sample_size": 3}),
    ("sana-sprint", {"guidance_embeds_scale": 0.7}),
    ("flux", {"num_layers": 4, "num_single_layers": 0}),
    ("flux", {"num_layers": 0, "num_single_layers": 4}),
    ("flux", {"num_layers": 1, "num_single_layers": 3, "out_channels": 16}),
    ("flux", {"axes_dims_rope": (2, 10, 4), "pooled_projection_dim": 5}),
    ("sd3", {"qk_norm": "layer_norm"}),
    ("sd3", {"qk_norm": "fp32_layer_norm", "dual_attention_layers": (1, 3, 9)}),
    ("sd3", {"dual_attention_layers": (3,), "out_channels": None}),
    ("sd3", {"patch_size": 1, "sample_size": 1}),
    ("sd3", {"patch_size": 3, "pos_embed_max_size": 4}),
    ("pixart", {"attention_bias": False}),
    ("pixart", {"norm_elementwise_affine": True, "norm_eps": 1e-3}),
    ("pixart", {"interpolation_scale": 2}),
    ("pixart", {"interpolation_scale": 0.5, "patch_size": 1}),
    ("pixart", {"sample_size": 128, "use_additional_conditions": False}),
    ("pixart", {"upcast_attention": True, "norm_num_groups": 7, "num_embeds_ada_norm": 5}),
    ("pixart", {"attention_type": None}),
    ("qwen_image", {"zero_cond_t": True}),
    ("qwen_image", {"use_layer3d_rope": True}),
    ("qwen_image", {"use_layer3d_rope": True, "zero_cond_t": True}),
    ("qwen_image", {"axes_dims_rope": (2, 4, 10), "joint_attention_dim": 11}),
    ("lumina2", {"num_refiner_layers": 0, "num_kv_heads": 4, "out_channels": 4}),
    ("lumina2", {"num_kv_heads": 1, "multiple_of": 5, "ffn_dim_multiplier": 0.3, "norm_eps": 1e-3}),
    ("lumina2", {"axes_dim_rope": (2, 4, 2), "axes_lens": (257, 2, 4), "cap_feat_dim": 11}),
    ("lumina2", {"sample_size": 3, "scaling_factor": 0.5}),
    ("chroma", {"num_layers": 4, "num_single_layers": 0}),
    ("chroma", {"num_layers": 1, "num_single_layers": 3, "out_channels": 16}),
    ("chroma", {"approximator_num_channels": 12, "approximator_hidden_dim": 9}),
    ("chroma", {"approximator_layers": 1, "axes_dims_rope": (2, 10, 4)}),
    ("flux2", {"num_layers": 4, "num_single_layers": 0}),
    ("flux2", {"num_layers": 1, "num_single_layers": 3, "out_channels": 16}),
    ("flux2", {"mlp_ratio": 1.3, "eps": 1e-3, "timestep_guidance_channels": 33}),
    ("flux2", {"axes_dims_rope": (2, 4, 8, 2), "rope_theta": 50}),
    ("flux2", {"guidance_embeds": True, "joint_attention_dim": 11}),
    ("z_image", {"n_refiner_layers": 0, "qk_norm": False, "norm_eps": 1e-3}),
    ("z_image", {"axes_dims": (2, 10, 4), "axes_lens": (514, 2, 4), "cap_feat_dim": 11}),
    ("z_image", {"rope_theta": 100.0, "t_scale": 7.5}),
    ("krea2", {"num_layerwise_text_blocks": 0, "num_refiner_text_blocks": 2, "num_text_layers": 3}),
    ("krea2", {"num_key_value_heads": 2, "text_num_key_value_heads": 2, "norm_eps": 1e-3}),
    ("krea2", {"axes_dims_rope": (2, 10, 4), "rope_theta": 100.0, "timestep_embed_dim": 6}),
    ("krea2", {"intermediate_size": 7, "text_intermediate_size": 5, "text_hidden_dim": 22}),
    ("qwen_image21", {"causal_condition": False, "mlp_ratio": 2, "eps": 1e-3}),
    ("qwen_image21", {"axes_dims_rope": (2, 10, 4), "context_in_dim": 11, "out_channels": None}),
]
"""Values beside those of `variants`; each gives the same as the stock forward."""
GRAPHS: list[tuple[str, dict[str, Any]]] = [
    (
        "sana",
        {
            "attention_bias": True,
            "norm_elementwise_affine": True,
            "qk_norm": "layer_norm_across_heads",
            "patch_size": 2,
        },
    ),
    ("sd3", {"qk_norm": "fp32_layer_norm", "dual_attention_layers": (1,)}),
    ("sd3", {"qk_norm": "layer_norm"}),
    ("pixart", {"attention_bias": False, "norm_elementwise_affine": True, "patch_size": 1}),
]
"""Those that change a block's graph, several at once."""

REFUSED: list[tuple[str, str, Any, str]] = [
    ("sana", "dropout", 0.1, "no random numbers"),
    ("sana", "qk_norm", "rms_norm", "SANA's attention"),
    ("sana", "qk_norm", "l2", "SANA's attention"),
    ("sana", "cross_attention_dim", None, "whole number"),
    ("sana", "cross_attention_dim", 48, "32, num_attention_heads times"),
    ("sana", "out_channels", 8, "in_channels"),
    ("sana", "out_channels", None, "whole number"),
    ("sana", "guidance_embeds", True, "false, by SanaPipeline"),
    ("sana", "guidance_embeds", 1, "false or true"),
    ("sana", "mlp_ratio", 0.001, "width"),
    ("sana", "interpolation_scale", 0, "above 0"),
    ("sana", "timestep_scale", -1.0, "above 0"),
    ("sana", "num_layers", 0, "1 to 1000"),
    ("sana", "num_layers", 10**9, "1 to 1000"),
    ("sana", "patch_size", 9, "at most 8, the sample_size"),
    ("flux", "patch_size", 2, "packs latents 2 x 2"),
    ("flux", "in_channels", 18, "multiple of 4"),
    ("flux", "out_channels", 4, "in_channels"),
    ("flux", "axes_dims_rope", [4, 6, 8], "a sum of 16"),
    ("flux", "axes_dims_rope", [5, 5, 6], "three even numbers"),
    ("flux", "axes_dims_rope", [8, 8], "three even numbers"),
    ("flux", "guidance_embeds", "yes", "false or true"),
    ("sd3", "qk_norm", "l2", "SD3's attention"),
    ("sd3", "qk_norm", "rms_norm_across_heads", "SD3's attention"),
    ("sd3", "pos_embed_max_size", None, "whole number"),
    ("sd3", "pos_embed_max_size", 0, "1 to 1024"),
    ("sd3", "caption_projection_dim", 48, "32, num_attention_heads times"),
    ("sd3", "out_channels", 8, "in_channels"),
    ("sd3", "dual_attention_layers", 2, "a list"),
    ("sd3", "dual_attention_layers", [-1], "a list"),
    ("sd3", "attention_head_dim", 15, "multiple of 4"),
    ("pixart", "activation_fn", "geglu", "no other"),
    ("pixart", "norm_type", "ada_norm_zero", "runs with no other"),
    ("pixart", "num_embeds_ada_norm", None, "whole number"),
    ("pixart", "attention_type", "gated", "no boxes"),
    ("pixart", "use_additional_conditions", True, "passes no resolution"),
    ("pixart", "caption_channels", None, "whole number"),
    ("pixart", "cross_attention_dim", None, "whole number"),
    ("pixart", "out_channels", 4, "noise and variance"),
    ("pixart", "dropout", 0.1, "no random numbers"),
    ("pixart", "double_self_attention", True, "its default"),
    ("qwen_image", "use_additional_t_cond", True, "false"),
    ("qwen_image", "guidance_embeds", True, "forward fails"),
    ("qwen_image", "patch_size", 1, "packs latents 2 x 2"),
    ("qwen_image", "out_channels", 16, "a quarter of in_channels"),
    ("qwen_image", "out_channels", None, "whole number"),
    ("qwen_image", "axes_dims_rope", [4, 6, 4], "a sum of 16"),
    ("qwen_image", "causal_condition", True, "no such key"),
    ("lumina2", "patch_size", 1, "rounds sizes"),
    ("lumina2", "hidden_size", 34, "multiple of 4"),
    ("lumina2", "num_kv_heads", 3, "divisor of 4"),
    ("lumina2", "axes_dim_rope", [4, 4, 2], "a sum of 8"),
    ("lumina2", "axes_lens", [256, 16, 16], "more than 256"),
    ("lumina2", "axes_lens", [300, 16], "3 whole numbers"),
    ("lumina2", "ffn_dim_multiplier", 0.001, "width"),
    ("lumina2", "out_channels", 8, "in_channels"),
    ("z_image", "all_patch_size", [2, 4], "2 x 2 latents"),
    ("z_image", "all_f_patch_size", [2], "one frame"),
    ("z_image", "siglip_feat_dim", 16, "passes no pictures"),
    ("z_image", "dim", 33, "multiple of 2"),
    ("z_image", "n_kv_heads", 1, "2, the n_heads"),
    ("z_image", "axes_dims", [4, 4, 4], "a sum of 16"),
    ("z_image", "axes_lens", [513, 16, 16], "514 or more"),
    ("krea2", "in_channels", 18, "multiple of 4"),
    ("krea2", "timestep_embed_dim", 15, "even number"),
    ("krea2", "text_hidden_dim", 25, "multiple of text_num"),
    ("krea2", "num_key_value_heads", 3, "divisor of 2"),
    ("krea2", "text_num_key_value_heads", 3, "divisor of 2"),
    ("krea2", "axes_dims_rope", [4, 4, 4], "a sum of 16"),
    ("qwen_image21", "patch_size", 2, "a token of each latent"),
    ("qwen_image21", "out_channels", 8, "in_channels"),
    ("qwen_image21", "axes_dims_rope", [4, 4, 4], "a sum of 16"),
    ("qwen_image21", "causal_condition", None, "false or true"),
    ("flux", "_use_default_values", ["guidance_embeds"], "no such key"),
    ("chroma", "num_layers", 0, "1 to 1000"),
    ("chroma", "patch_size", 2, "packs latents 2 x 2"),
    ("chroma", "in_channels", 18, "multiple of 4"),
    ("chroma", "axes_dims_rope", [4, 6, 8], "a sum of 16"),
    ("chroma", "approximator_num_channels", 10, "a multiple of 4"),
    ("chroma", "guidance_embeds", True, "no such key"),
    ("flux2", "num_layers", 0, "1 to 1000"),
    ("flux2", "out_channels", 4, "in_channels"),
    ("flux2", "axes_dims_rope", [4, 6, 6], "four even numbers"),
    ("flux2", "axes_dims_rope", [4, 4, 4, 6], "a sum of 16"),
    ("flux2", "mlp_ratio", 0.001, "at least 1 / 32"),
    ("flux2", "rope_theta", 0, "above 0"),
    *((family, "a_new_switch", True, "no such key") for family in FAMILIES),
]
"""Family, key, value, and what is said of it."""


def named(family: str, change: dict[str, Any]) -> str:
    return "-".join([family, *(f"{key}={value}" for key, value in change.items())])


def folder_with(folder: Path, family: str, config: dict[str, Any]) -> Path:
    """A pipeline folder with nothing but model_index.json and the transformer's configuration."""
    sprint = config.get("guidance_embeds") is True and family == "sana"
    pipeline = FAMILIES[family][1 if sprint else 0]
    (folder / "transformer").mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    settings = {"_class_name": family_of(family).transformer, **config}
    (folder / "transformer" / "config.json").write_text(json.dumps(settings))
    return folder


def attempt(work: Callable[[], Any]) -> tuple[Any, BadInput | None]:
    """What ``work`` gives, or the fault that it ends with."""
    try:
        return work(), None
    except BadInput as fault:
        return None, fault


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_the_installed_class_is_in_the_table(family):
    made = family_of(family)
    keys = defaults_of(made.transformer).keys() | RETIRED.get(family, set())
    assert made.switches.keys() == keys
    assert made.vae_switches.keys() <= defaults_of(made.autoencoder).keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configurations_are_accepted(name, tmp_path):
    public = CONFIGS[name]
    read = public.resolved().config(folder_with(tmp_path, public.family, public.config))
    assert read.keys() == defaults_of(public.resolved().transformer).keys() | {"_class_name"}
    for key, value in public.config.items():
        assert read[key] == (list(value) if isinstance(value, tuple) else value)


def test_keys_that_published_configurations_have_beside_their_class(tmp_path):
    """Qwen-Image has a width of text it never pooled, PixArt-Sigma keys of Transformer2DModel."""
    qwen = {**VARIANTS["qwen-image"][1], "pooled_projection_dim": 768}
    family_of("qwen_image").config(folder_with(tmp_path / "qwen", "qwen_image", qwen))
    legacy = {"double_self_attention": False, "num_vector_embeds": None}
    pixart = {**VARIANTS["pixart-sigma"][1], **legacy, "_class_name": "Transformer2DModel"}
    pixart |= {"_diffusers_version": "0.26.0", "_name_or_path": "x"}
    read = family_of("pixart").config(folder_with(tmp_path / "pixart", "pixart", pixart))
    assert read["_class_name"] == "PixArtTransformer2DModel"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_absent_key_has_the_classs_default(family, tmp_path):
    read = family_of(family).config(folder_with(tmp_path, family, {}))
    defaults = defaults_of(family_of(family).transformer)
    changed = {"use_additional_conditions"}
    assert {k: v for k, v in read.items() if k not in {"_class_name", *changed}} == {
        k: v for k, v in defaults.items() if k not in changed
    }


# ---------------------------------------------------------------- implemented


@pytest.fixture
def changed(monkeypatch):
    """Adds a variant with a changed configuration; its name."""

    def make(base: str, change: dict[str, Any]) -> str:
        family, config = VARIANTS[BASE.get(base, base)]
        monkeypatch.setitem(VARIANTS, "changed", (family, {**config, **change}))
        return "changed"

    return make


@pytest.mark.parametrize(("base", "change"), IMPLEMENTED, ids=[named(*c) for c in IMPLEMENTED])
def test_an_implemented_value_gives_what_the_stock_forward_gives(base, change, changed, tmp_path):
    variant = changed(base, change)
    family, config = VARIANTS[variant]
    family_of(family).config(folder_with(tmp_path, family, config))
    contract.test_replay_with_nothing_skipped_is_the_stock_forward(variant)
    contract.test_entry_state_trained_blocks_and_tail_residual_give_the_stock_forward(
        variant, (0, 2)
    )
    contract.test_gradients_are_the_stock_models_when_no_tail_is_skipped(variant, 1)
    contract.test_no_lora_is_put_where_the_loss_does_not_reach(variant)
    contract.test_every_block_gets_what_the_stock_forward_calls_it_with(variant)


@pytest.mark.parametrize(("base", "change"), GRAPHS, ids=[named(*c) for c in GRAPHS])
def test_an_implemented_value_trains_like_torch_in_onnx(base, change, changed, tmp_path):
    variant = changed(base, change)
    _, batch, opened = bundles.write(tmp_path, "onnx", made=bundles.made_variant(variant, "across"))
    for layout in ("fused", "streamed"):
        sub, _ = bundles.made_variant(variant, "across")
        bundles.assert_trains_like_torch(open_session(opened, "onnx", layout), sub, batch)


def test_tokens_of_the_other_kind_would_be_noticed(monkeypatch):
    """zero_cond_t: the second half of temb is another, and no token here is modulated by it."""
    family = family_of("qwen_image")
    stock = type(family).arguments

    def other(self, cond, grid):
        told = stock(self, cond, grid)
        return {**told, "modulate_index": torch.ones_like(told["modulate_index"])}

    made = variants.case("qwen-image-zero-cond")
    assert family.begin(made.model, made.inputs)[1]["temb"].shape[0] == 2
    monkeypatch.setattr(type(family), "arguments", other)
    with pytest.raises(AssertionError):
        contract.test_replay_with_nothing_skipped_is_the_stock_forward("qwen-image-zero-cond")


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("family", "key", "value", "said"), REFUSED, ids=[f"{f}-{k}={v}" for f, k, v, _ in REFUSED]
)
def test_what_is_not_implemented_is_refused_by_its_name(family, key, value, said, tmp_path):
    folder = folder_with(tmp_path, family, VARIANTS[BASE[family]][1])
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(BadInput) as caught:
        family_of(family).config(folder)
    faults = getattr(caught.value, "faults", [caught.value])
    fault = next(fault for fault in faults if fault.found.startswith(f"{key} = "))
    assert fault.where == str(path)
    assert json.dumps(value) in fault.found
    assert said in fault.expected
    assert fault.remedy


def test_all_faults_of_a_configuration_come_together(tmp_path):
    config = {**VARIANTS["qwen-image"][1], "use_additional_t_cond": True, "num_layers": "60"}
    with pytest.raises(ManyFaults) as caught:
        family_of("qwen_image").config(folder_with(tmp_path, "qwen_image", config))
    assert [fault.found for fault in caught.value.faults] == [
        'num_layers = "60"',
        "use_additional_t_cond = true: not implemented",
    ]


# ---------------------------------------------------------------- at plan

JOB = """
[model]
path = "model"
[data]
images = "images"
prompt = "a sks toy"
[train]
resolution = 32
patch = 16
"""


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """Pipeline folders by name, each made once; not to be changed."""
    root, made = tmp_path_factory.mktemp("switches"), {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = pipelines.write_pipeline(name, root / name)
        return made[name]

    return make


@pytest.fixture
def place(made_once, tmp_path):
    """A folder with a job and a pipeline, of which one configuration is changed."""

    def make(name: str, part: str = "", change: dict[str, Any] | None = None) -> Path:
        shutil.copytree(made_once(name), tmp_path / "model")
        (tmp_path / "images").mkdir()
        Image.new("RGB", (48, 60)).save(tmp_path / "images" / "0.png")
        (tmp_path / "job.toml").write_text(JOB)
        if part:
            [path] = (tmp_path / "model" / part).glob("*config.json")
            settings_ = {**json.loads(path.read_text()), **(change or {})}
            path.write_text(json.dumps(settings_))
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("name", "key"),
    [("qwen-image", "use_additional_t_cond"), ("flux-dev", "a_new_switch")],
)
def test_plan_ends_with_bad_input_and_names_the_switch(name, key, place, monkeypatch, capsys):
    folder = place(name, "transformer", {key: True})
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["edge-dit", "plan", "job.toml", "-o", "plan.json"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert f"config.json: {key} = true: not implemented" in told
    assert "remedy: use a checkpoint without it" in told
    assert "Traceback" not in told
    assert not (folder / "plan.json").exists()


@pytest.mark.parametrize("key", ["num_layers", "patch_size", "num_attention_heads"])
def test_a_key_that_is_absent_is_no_traceback(key, place):
    """Diffusers takes the class's default; then the weights do not fit, or the plan is that."""
    folder = place("sana")
    path = folder / "model" / "transformer" / "config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    plan, fault = attempt(lambda: make_plan(read_job(folder / "job.toml")))
    if plan is None:
        assert str(path.parent) in str(fault)
    else:
        assert plan.layers == (20 if key == "num_layers" else 4)


def test_more_tokens_a_side_than_sd3_has_positions_are_refused(place, changed):
    """Four tokens a side are there: 32 pixels."""
    folder = place("sd3-medium")
    variant = changed("sd3", {"pos_embed_max_size": 4})
    variants.transformer(variant).save_pretrained(folder / "model" / "transformer")
    assert make_plan(read_job(folder / "job.toml")).s_max == 32
    job = folder / "job.toml"
    job.write_text(JOB.replace("resolution = 32", "resolution = 40").replace("= 16", "= 30"))
    with pytest.raises(ManyFaults) as caught:
        make_plan(read_job(job))
    told = str(caught.value)
    assert "train.patch: 30 pixels\n  expected: a multiple of 8" in told
    assert "train.resolution: 40 pixels, 5 tokens a side" in told
    assert "pos_embed_max_size" in told
    assert "at most 32 pixels" in told


@pytest.mark.parametrize(
    ("name", "part", "key", "value"),
    [
        ("flux-dev", "vae", "shift_factor", None),
        ("sd3-medium", "vae", "scaling_factor", 0),
        ("sd3-medium", "vae", "in_channels", 4),
        ("pixart-sigma", "vae", "block_out_channels", []),
        ("pixart-sigma", "vae", "scaling_factor", "0.13"),
        ("sana", "vae", "encoder_block_out_channels", 3),
        ("sana", "vae", "scaling_factor", None),
        ("qwen-image", "vae", "input_channels", 4),
        ("qwen-image", "vae", "latents_std", [1.0, 0.0, 1.0, 1.0]),
        ("qwen-image", "vae", "latents_mean", [1.0]),
        ("qwen-image", "vae", "temperal_downsample", [True]),
        ("lumina2", "vae", "block_out_channels", [8, 8, 8]),
        ("flux2-klein", "vae", "patch_size", [1, 1]),
        ("flux2-klein", "vae", "batch_norm_eps", 0),
        ("sana", "scheduler", "prediction_type", "epsilon"),
        ("sana", "scheduler", "use_flow_sigmas", False),
        ("sana", "scheduler", "flow_shift", None),
        ("sana-sprint", "scheduler", "prediction_type", "v_prediction"),
        ("flux-dev", "scheduler", "invert_sigmas", True),
        ("flux-dev", "scheduler", "num_train_timesteps", 0),
        ("sd3-medium", "scheduler", "shift", -1),
        ("sd3-medium", "scheduler", "time_shift_type", "cubic"),
        ("qwen-image", "scheduler", "_class_name", "DDIMScheduler"),
        ("qwen-image", "scheduler", "_class_name", "NoScheduler"),
        ("pixart-sigma", "scheduler", "_class_name", "FlowMatchEulerDiscreteScheduler"),
        ("pixart-sigma", "scheduler", "prediction_type", "v_prediction"),
        ("pixart-sigma", "scheduler", "rescale_betas_zero_snr", True),
        ("pixart-sigma", "scheduler", "beta_schedule", "cubic"),
        ("pixart-sigma", "scheduler", "beta_end", 2),
        ("pixart-sigma", "scheduler", "use_flow_sigmas", True),
    ],
)
def test_autoencoders_and_schedulers_are_refused_at_plan_too(name, part, key, value, place):
    folder = place(name, part, {key: value})
    if key == "_class_name":
        path = folder / "model" / part / "scheduler_config.json"
        path.write_text(json.dumps({key: value}))
    with pytest.raises(BadInput) as caught:
        make_plan(read_job(folder / "job.toml"))
    told = str(caught.value)
    assert "config.json" in told or "no class" in told
    if key not in ("_class_name", "flow_shift", "time_shift_type", "beta_schedule"):
        assert f"{key} = " in told


# ---------------------------------------------------------------- any value at all

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 40),
    st.sampled_from([2**31, 2**63, 10**30, WIDEST, LARGEST, DEEPEST + 1]),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-2, 16), max_size=4),
    st.lists(st.one_of(st.none(), st.text(max_size=2), st.floats()), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    st.sampled_from(["rms_norm", "layer_norm", "l2", "gelu", "default", "sincos"]),
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_changed_key_works_or_is_refused(family, data, tmp_path):
    """What is accepted runs: the stock forward and the blocks one by one, on the meta device."""
    _, config = VARIANTS[BASE[family]]
    made = family_of(family)
    key = data.draw(st.sampled_from(sorted(made.switches)))
    config = {**defaults_of(made.transformer), **config, key: data.draw(VALUES)}
    folder = folder_with(tmp_path, family, config)
    read, fault = attempt(lambda: made.config(folder))
    if fault is not None:
        assert "config.json: " in str(fault)
        return
    if made.grid_faults(read, {"train.resolution": max(GRID)}, multiple=1):
        return
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), made.traceable(), torch.no_grad():
        model = meta_model(made, read)
        latents, prompt = made.blank(model, GRID, TEXT)
        state, cond = made.begin(model, made.inputs(model, latents, 500.0, prompt, GRID))
        for block in made.blocks(model).items():
            state = made.run_block(*block, state, cond, GRID)
        found = made.learned(made.head(model, state.image, cond, GRID))
    assert found.shape == latents.shape


SCHEDULERS = {
    "sana": "DPMSolverMultistepScheduler",
    "flux": "FlowMatchEulerDiscreteScheduler",
    "pixart": "DPMSolverMultistepScheduler",
}


@pytest.mark.parametrize("family", SCHEDULERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_changed_key_of_a_scheduler_works_or_is_refused(family, data):
    name = SCHEDULERS[family]
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    config = {**defaults_of(name), **(flow if family == "sana" else {}), "_class_name": name}
    key = data.draw(st.sampled_from(sorted(config)))
    config[key] = data.draw(VALUES)
    learned, fault = attempt(lambda: family_of(family).objective(config))
    if fault is None:
        assert all(0 < sigma <= 1 for sigma in learned.sigmas)
    else:
        assert str(fault).startswith(("scheduler", "diffusers"))


@pytest.mark.parametrize("family", FAMILIES)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_changed_key_of_an_autoencoder_works_or_is_refused(family, data, tmp_path):
    made = family_of(family)
    config = {**defaults_of(made.autoencoder), "_class_name": made.autoencoder}
    config |= {"shift_factor": 0.1} if made.autoencoder == "AutoencoderKL" else {}
    key = data.draw(st.sampled_from(sorted(made.vae_switches)))
    config[key] = data.draw(VALUES)
    (tmp_path / "vae").mkdir(exist_ok=True)
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    read, fault = attempt(lambda: made.vae_config(tmp_path))
    if fault is None:
        assert made.multiple({"patch_size": 1}, read) >= 1
    else:
        assert f"{key} = " in str(fault) or "values" in str(fault)


@pytest.mark.parametrize("class_name", PIPELINE_FAMILY)
def test_what_is_refused_for_the_pipelines_sake_the_pipeline_does_not_pass(class_name):
    """A pipeline that learns to pass one of these makes its refusal wrong."""
    import diffusers

    source = inspect.getsource(getattr(diffusers, class_name).__call__)
    assert "additional_t_cond" not in source
    assert "gligen" not in source
