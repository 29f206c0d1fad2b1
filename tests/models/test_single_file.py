"""Checkpoints in one file, in the layout of the models' authors -> a diffusers folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

import original
import pipelines
import variants
from edge_dit.errors import BadInput
from edge_dit.models.model import open_model
from edge_dit.models.pipeline import load_pipeline
from edge_dit.models.single_file import convert
from edge_dit.models.source import locate
from hub_server import TOKEN

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory) -> Path:
    return pipelines.write_pipeline("sd3-medium", tmp_path_factory.mktemp("sd3") / "tiny-sd3")


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return {
        k: v for file in (folder / part).glob("*.safetensors") for k, v in load_file(file).items()
    }


def assert_same(made: Path, stock: Path, parts: tuple[str, ...], dtype: torch.dtype) -> None:
    for part in parts:
        ours, theirs = weights(made, part), weights(stock, part)
        assert ours.keys() == theirs.keys(), part
        for name, tensor in theirs.items():
            assert ours[name].dtype == dtype, (part, name)
            assert torch.equal(ours[name], tensor.to(dtype)), (part, name)


def refused(path: Path, config=None) -> str:
    with pytest.raises(BadInput) as caught:
        convert(path, config)
    assert caught.value.remedy
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stable_diffusion_3_transformer_and_autoencoder(tmp_path, sd3, dtype):
    state = original.sd3(sd3) | original.autoencoder(sd3)
    path = original.write(state, tmp_path / "sd3_tiny.safetensors", dtype)
    found = locate(path, config=sd3)
    assert found.name == "sd3_tiny.safetensors"
    assert_same(found.folder, sd3, ("transformer", "vae"), dtype)
    assert_same(found.folder, sd3, ("text_encoder", "text_encoder_3"), torch.float32)
    load_pipeline(found.folder)
    again = locate(path, config=sd3)
    assert again == found


def test_stable_diffusion_3_with_its_text_encoders_needs_no_other_weights(tmp_path, sd3):
    stock, bare = tmp_path / "stock", tmp_path / "bare"
    shutil.copytree(sd3, stock)
    # diffusers gives CLIP-L an identity as its projection, as the authors' code does
    encoder = CLIPTextModelWithProjection.from_pretrained(
        stock / "text_encoder", projection_dim=8, ignore_mismatched_sizes=True
    )
    encoder.text_projection.weight.data = torch.eye(8)
    encoder.save_pretrained(stock / "text_encoder")
    shutil.copytree(stock, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    state = original.sd3(stock) | original.autoencoder(stock) | original.encoders(stock, ENCODERS)
    made = convert(original.write(state, tmp_path / "whole.safetensors"), bare)
    assert_same(made, stock, ("transformer", "vae", *ENCODERS), torch.float32)
    assert open_model(made).layers == open_model(stock).layers
    load_pipeline(made)


def test_a_part_that_nobody_has(tmp_path, sd3):
    bare = tmp_path / "bare"
    shutil.copytree(sd3, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    message = refused(original.write(original.sd3(sd3), tmp_path / "x.safetensors"), bare)
    assert "vae" in message
    assert "config" in message


def test_sana_takes_the_rest_from_the_pipeline(tmp_path):
    stock = SAMPLES / "tiny-sana"
    path = original.write(original.sana(stock), tmp_path / "sana.safetensors")
    made = convert(path, stock)
    assert_same(made, stock, ("transformer", "vae", "text_encoder"), torch.float32)
    assert open_model(made).layers == open_model(stock).layers


def test_flux_in_diffusers_names(tmp_path):
    stock = SAMPLES / "tiny-flux"
    state = weights(stock, "transformer")
    made = convert(original.write(state, tmp_path / "flux.safetensors"), stock)
    assert_same(made, stock, ("transformer",), torch.float32)


def deep(tmp_path: Path, sd3: Path) -> Path:
    """A pipeline of 38 blocks: by their number diffusers tells Stable Diffusion 3.5 large."""
    folder = tmp_path / "deep"
    shutil.copytree(sd3, folder)
    config = variants.VARIANTS["sd3.5-large"][1] | {"num_layers": 38}
    torch.manual_seed(0)
    SD3Transformer2DModel(**config).save_pretrained(folder / "transformer")
    return folder


def test_without_config_the_hub_has_the_rest(tmp_path, sd3, hub, monkeypatch):
    folder = deep(tmp_path, sd3)
    path = original.write(
        original.sd3(folder) | original.autoencoder(folder), tmp_path / "large.safetensors"
    )
    message = refused(path)
    assert "stabilityai/stable-diffusion-3.5-large, which cannot be had" in message
    hub.add("stabilityai/stable-diffusion-3.5-large", folder, gated=True)
    message = refused(path)
    assert "licence" in message
    assert "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    made = convert(path)
    assert_same(made, folder, ("transformer", "vae", "text_encoder_3"), torch.float32)
    assert hub.served["text_encoder/model.safetensors"] == 1
    assert not {
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    } & set(hub.served)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert convert(path) == made
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert "HF_HUB_OFFLINE" in refused(path)


def test_sana_of_another_size_than_diffusers_takes_it_for(tmp_path, hub):
    """Diffusers takes every SANA file for the 1.6B one."""
    stock = SAMPLES / "tiny-sana"
    other = tmp_path / "other"
    shutil.copytree(stock, other)
    config = other / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 6}))
    hub.add("Efficient-Large-Model/Sana_1600M_1024px_diffusers", other)
    path = original.write(original.sana(stock), tmp_path / "sana.safetensors")
    message = refused(path)
    assert "does not fit" in message
    assert "[model] config" in message


def test_another_configuration_is_another_folder_and_another_file_too(tmp_path, sd3):
    state = original.sd3(sd3)
    path = original.write(state, tmp_path / "x.safetensors")
    other = tmp_path / "other"
    shutil.copytree(sd3, other)
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": 2.0}))
    first, second = convert(path, sd3), convert(path, other)
    assert first != second
    original.write({k: v + 1 for k, v in state.items()}, path)
    assert convert(path, sd3) not in (first, second)


def test_a_configuration_of_another_size(tmp_path, sd3):
    wider = tmp_path / "wider"
    shutil.copytree(sd3, wider)
    config = wider / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 4}))
    path = original.write(original.sd3(sd3), tmp_path / "x.safetensors")
    assert "does not fit" in refused(path, wider)
    config.write_text(
        json.dumps(json.loads((sd3 / "transformer/config.json").read_text()) | {"num_layers": 9})
    )
    assert "transformer" in refused(path, wider)
    assert not list((tmp_path / "cache").rglob("model_index.json"))


def test_families_that_diffusers_does_not_convert(tmp_path):
    folder = pipelines.write_pipeline("pixart-sigma", tmp_path / "pixart")
    path = original.write(weights(folder, "transformer"), tmp_path / "x.safetensors")
    assert "converts no single files to PixArt" in refused(path, folder)


def test_files_that_are_no_checkpoint(tmp_path):
    one = torch.ones(2, 2)
    cases = {
        "unknown": ({"a.weight": one}, "supported family"),
        "lora": ({"transformer.x.lora_A.weight": one}, "adapter"),
        "kohya": ({"lora_unet_x.lora_down.weight": one}, "adapter"),
        "m-00001-of-00002": ({"a": one}, "shard"),
        "fp8": ({"a": one.to(torch.float8_e4m3fn)}, "quantised"),
        "int8": ({"a": one.to(torch.int8)}, "quantised"),
        "sdxl": ({"model.diffusion_model.input_blocks.0.0.weight": one}, "supported family"),
    }
    for name, (state, words) in cases.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        assert words in refused(tmp_path / f"{name}.safetensors"), name
    for name, content in {"empty": b"", "junk": b"x" * 99, "html": b"<html>" * 50}.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        assert "damaged" in refused(tmp_path / f"{name}.safetensors"), name
