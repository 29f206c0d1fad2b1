"""The LoRA file, by really loading it: every key used, the right scale, the same prediction."""

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from edge_dit.adapter import DIFFUSERS_FILE, read_adapter, write_adapter, write_adapter_folder
from edge_dit.errors import BadInput
from edge_dit.evaluate import adapted
from edge_dit.pipeline import load_pipeline
from edge_dit.reference import adapted_subgraph, load_transformer
from edge_dit.subgraph import add_lora, lora_modules


@pytest.fixture(scope="module")
def tensors(road):
    """A trained-looking adapter: B is not zero."""
    rng = np.random.default_rng(0)
    subgraph, _ = adapted_subgraph(road.plan)
    return {
        name: rng.normal(0, 0.1, tuple(p.shape)).astype(np.float32)
        for name, p in subgraph.lora_parameters().items()
    }


@pytest.fixture
def folder(road, tensors, tmp_path):
    path = tmp_path / "lora"
    write_adapter_folder(path, tensors, road.plan.rank, road.plan.alpha, "model")
    return path


def inputs():
    generator = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(1, 8, 4, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 6, 96, generator=generator),
        "encoder_attention_mask": torch.ones(1, 6),
        "timestep": torch.tensor([400.0]),
    }


def our_forward(road, tensors) -> torch.Tensor:
    """The model with LoRA put in by us: alpha is twice the rank in this job."""
    from edge_dit.families import sana

    model = load_transformer(road.plan)
    plan = road.plan
    modules = lora_modules(sana, plan.trained, plan.lora_targets)
    add_lora(model, modules, plan.rank, plan.alpha, seed=9)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            stored = tensors["transformer." + name.replace(".default", "")]
            parameter.data.copy_(torch.from_numpy(stored))
    with torch.no_grad():
        return model(**inputs(), return_dict=False)[0]


def test_pipeline_loads_every_key_at_the_right_scale(road, tensors, folder):
    assert road.plan.alpha != road.plan.rank
    pipeline = SanaPipeline.from_pretrained(road.plan.model)
    with torch.no_grad():
        before = pipeline.transformer(**inputs(), return_dict=False)[0]
    pipeline.load_lora_weights(folder)
    state = pipeline.transformer.state_dict()
    for name, value in tensors.items():
        key = name.removeprefix("transformer.").replace(".weight", ".default_0.weight")
        torch.testing.assert_close(state.pop(key), torch.from_numpy(value))
    assert not [key for key in state if "lora_" in key]
    with torch.no_grad():
        after = pipeline.transformer(**inputs(), return_dict=False)[0]
    torch.testing.assert_close(after, our_forward(road, tensors), atol=1e-5, rtol=0)
    assert (after - before).abs().max() > 1e-3


def test_peft_copy_loads_too(road, tensors, folder):
    model = PeftModel.from_pretrained(load_transformer(road.plan), folder / "peft")
    with torch.no_grad():
        found = model(**inputs(), return_dict=False)[0]
    torch.testing.assert_close(found, our_forward(road, tensors), atol=1e-5, rtol=0)


def test_pictures_change_with_it_and_come_back_without(road, folder):
    from edge_dit.families import sana

    pipeline = load_pipeline(road.plan.model)
    before = np.asarray(sana.sample(pipeline, "a sks toy", 64, [1])[0])
    with adapted(pipeline, folder):
        after = np.asarray(sana.sample(pipeline, "a sks toy", 64, [1])[0])
    restored = np.asarray(sana.sample(pipeline, "a sks toy", 64, [1])[0])
    assert (before != after).any()
    assert (before == restored).all()


def test_round_trip(tensors, tmp_path):
    write_adapter(tmp_path / "a.safetensors", tensors, 4, 8.0)
    found, rank, alpha = read_adapter(tmp_path / "a.safetensors")
    assert (rank, alpha) == (4, 8.0)
    assert all((found[name] == value).all() for name, value in tensors.items())


def test_a_folder_of_something_else_is_not_replaced(tensors, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(BadInput, match="already there"):
        write_adapter_folder(tmp_path, tensors, 4, 8.0, "model")
    assert (tmp_path / "letter.txt").read_text() == "dear"
    assert not (tmp_path / DIFFUSERS_FILE).exists()


@given(data=st.binary(max_size=300))
def test_any_bytes_are_no_adapter(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(BadInput):
        read_adapter(path)
