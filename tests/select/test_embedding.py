"""Pictures as vectors: DINO, DINOv2 and CLIP as transformers stores them, and the autoencoder."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

import pipelines
from edge_dit.errors import BadInput
from edge_dit.models.pipeline import load_pipeline
from edge_dit.select.embedding import distance, embedder

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CLIP = {**SMALL, "intermediate_size": 32}
SIZES = {
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
}


def vision_model(kind, folder):
    """A random model and its image processor, saved."""
    torch.manual_seed(0)
    if kind == "DINOv2":
        model, processor = Dinov2Model(Dinov2Config(**SMALL)), BitImageProcessorPil(**SIZES)
    elif kind == "DINO":  # stored without a pooler, as facebook/dino-vits16 is
        model = ViTModel(ViTConfig(**SMALL, intermediate_size=32), add_pooling_layer=False)
        processor = ViTImageProcessorPil(size={"height": 28, "width": 28})
    elif kind == "CLIP":
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text |= {"intermediate_size": 32, "vocab_size": 50}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=CLIP, projection_dim=8))
        processor = CLIPImageProcessorPil(**SIZES)
    else:
        model, processor = CLIPVisionModel(CLIPVisionConfig(**CLIP)), CLIPImageProcessorPil(**SIZES)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval(), processor


def pictures(count, side=32):
    """Squares of 8 pixels in random colours: noise of single pixels is lost in an autoencoder that
    makes one latent of 16 x 16.
    """
    rng = np.random.default_rng(1)
    cells = rng.integers(0, 256, (count, side // 8, side // 8, 3), dtype=np.uint8)
    return [Image.fromarray(one.repeat(8, 0).repeat(8, 1)) for one in cells]


KINDS = {"DINOv2": "DINOv2", "DINO": "DINO", "CLIP": "CLIP", "CLIP vision": "CLIP"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_loaded_as_transformers_stores_it(kind, tmp_path):
    model, processor = vision_model(kind, tmp_path / "vision")
    embed = embedder(str(tmp_path / "vision"), None)
    assert embed.name == f"{KINDS[kind]} (folder)"
    drawn = pictures(3)
    found = embed(drawn)
    with torch.no_grad():
        pixels = processor(images=drawn, return_tensors="pt")
        if kind == "CLIP":
            expected = model.visual_projection(model.vision_model(**pixels).pooler_output)
        elif kind == "CLIP vision":
            expected = model(**pixels).pooler_output
        else:
            expected = model(**pixels).last_hidden_state[:, 0]
    assert found.shape == expected.shape
    expected = expected / expected.norm(dim=1, keepdim=True)
    assert (found - expected).abs().max() < 1e-5
    assert distance(found, found) == pytest.approx(0, abs=1e-6)
    assert distance(found, found.roll(1, 0)) > 1e-4


@pytest.mark.parametrize("name", [n for n in pipelines.PIPELINES if n != "sd3-without-t5"])
def test_without_one_the_autoencoder_serves(name, tmp_path):
    pipeline = load_pipeline(pipelines.write_pipeline(name, tmp_path / "model"))
    embed = embedder(None, pipeline)
    assert embed.name == "VAE latents"
    one, again = embed(pictures(2)), embed(pictures(2))
    assert torch.equal(one, again)
    assert torch.allclose(one.norm(dim=1), torch.ones(2))
    assert distance(one, one) == pytest.approx(0, abs=1e-6)
    assert distance(one, one.roll(1, 0)) > 1e-3


@pytest.mark.parametrize(
    ("file", "content", "found"),
    [
        ("config.json", None, "cannot load"),
        ("config.json", "{", "cannot load"),
        ("config.json", '{"model_type": "nonesuch"}', "cannot load"),
        ("preprocessor_config.json", None, "cannot load"),
        ("model.safetensors", None, "cannot load"),
        ("model.safetensors", "short", "cannot load"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, file, content, found):
    vision_model("DINOv2", tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(BadInput, match=found) as caught:
        embedder(str(tmp_path), None)
    assert caught.value.where == str(tmp_path)


def test_weights_that_are_not_there_are_not_made_up(tmp_path):
    vision_model("DINOv2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(BadInput, match="tensors are missing"):
        embedder(str(tmp_path), None)


def test_another_kind_of_model_is_refused(tmp_path):
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    SiglipVisionModel(SiglipVisionConfig(**CLIP)).save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="siglip"):
        embedder(str(tmp_path), None)


def test_what_is_neither_folder_nor_on_the_hub_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="cannot load"):
        embedder("nobody/nothing-of-this-name", None)
    with pytest.raises(BadInput, match="cannot load"):
        embedder("/no/such/folder", None)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(-9, 9), min_size=3, max_size=3), min_size=2, max_size=6))
def test_distance_is_one_less_the_cosine(rows):
    one = torch.nn.functional.normalize(torch.tensor(rows) + 0.5, dim=1)
    assert -1e-5 < distance(one, one.roll(1, 0)) < 2 + 1e-5
    expected = 1 - torch.cosine_similarity(one, one.roll(1, 0)).mean()
    assert distance(one, one.roll(1, 0)) == pytest.approx(float(expected), abs=1e-5)
