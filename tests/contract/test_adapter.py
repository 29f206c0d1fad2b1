"""LoRA files: whole or absent, read as written, and loaded by PEFT too.

That the stock pipelines load them is shown for every family in test_family_pipelines.py.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from edge_dit.contract.adapter import (
    PEFT_CONFIG,
    loading_hint,
    peft_folder,
    read_adapter,
    read_lora,
    read_peft,
    write_adapter,
    write_adapter_folder,
)
from edge_dit.contract.adapter_formats import DIFFUSERS, PEFT
from edge_dit.errors import BadInput
from edge_dit.models.families.sana import FAMILY
from edge_dit.models.pipeline import load_pipeline
from edge_dit.models.subgraph import TrainableSubgraph
from edge_dit.planning.plan import model_of
from edge_dit.reference.eager import adapted_subgraph
from edge_dit.reference.evaluate import adapted


@pytest.fixture(scope="module")
def tensors(road):
    """A trained-looking adapter: B is not zero."""
    rng = np.random.default_rng(0)
    subgraph, _ = adapted_subgraph(road.plan, model_of(road.plan))
    return {
        name: rng.normal(0, 0.1, tuple(p.shape)).astype(np.float32)
        for name, p in subgraph.lora_parameters().items()
    }


@pytest.fixture
def folder(road, tensors, tmp_path):
    path = tmp_path / "lora"
    write_adapter_folder(path, tensors, road.plan.rank, road.plan.alpha, "model")
    return path


def test_peft_copy_loads_too(road, tensors, folder):
    """Every key, at the right scale: alpha is twice the rank in this job."""
    assert road.plan.alpha != road.plan.rank
    subgraph, batch = adapted_subgraph(road.plan, model_of(road.plan))
    for name, parameter in subgraph.lora_parameters().items():
        parameter.data.copy_(torch.from_numpy(tensors[name]))
    model = model_of(road.plan).checkpoint().model(range(road.plan.layers))
    loaded = PeftModel.from_pretrained(model, folder / "peft").get_base_model()
    plan = road.plan
    same = TrainableSubgraph(loaded, FAMILY, plan.trained, plan.grid)
    batch = {name: torch.randn(value.shape) for name, value in batch.items()}
    with torch.no_grad():
        found, expected = same.predict(batch), subgraph.predict(batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_pictures_change_with_it_and_come_back_without(road, folder):
    pipeline = load_pipeline(road.plan.model)
    before = np.asarray(FAMILY.sample(pipeline, "a sks toy", 64, [1])[0])
    with adapted(pipeline, folder):
        after = np.asarray(FAMILY.sample(pipeline, "a sks toy", 64, [1])[0])
    restored = np.asarray(FAMILY.sample(pipeline, "a sks toy", 64, [1])[0])
    assert (before != after).any()
    assert (before == restored).all()


def test_round_trip(tensors, tmp_path):
    write_adapter(tmp_path / "a.safetensors", tensors, 4, 8.0)
    found, rank, alpha = read_adapter(tmp_path / "a.safetensors")
    assert (rank, alpha) == (4, 8.0)
    assert all((found[name] == value).all() for name, value in tensors.items())


def test_a_folder_of_something_else_is_not_replaced(road, tensors, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(BadInput, match="already there"):
        write_adapter_folder(tmp_path, tensors, road.plan.rank, 8.0, "model")
    assert (tmp_path / "letter.txt").read_text() == "dear"
    assert not (tmp_path / DIFFUSERS.file).exists()


@pytest.mark.parametrize("form", [DIFFUSERS, PEFT], ids=lambda form: form.name)
def test_what_a_folder_holds(road, tensors, tmp_path, form):
    folder, rank = tmp_path / "lora", road.plan.rank
    for _ in range(2):  # a second one replaces the first
        write_adapter_folder(folder, tensors, rank, 8.0, "model", form)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    peft = {PEFT.file, PEFT_CONFIG}
    expected = peft if form == PEFT else {DIFFUSERS.file, *(f"peft/{name}" for name in peft)}
    assert files == expected
    assert {path.name for path in peft_folder(folder).iterdir()} == peft
    wanted = "PeftModel.from_pretrained" if form == PEFT else "load_lora_weights"
    assert wanted in loading_hint(folder, form)
    assert repr(str(folder)) in loading_hint(folder, form)
    other = DIFFUSERS if form == PEFT else PEFT
    with pytest.raises(BadInput, match="already there"):  # the other kind does not
        write_adapter_folder(folder, tensors, rank, 8.0, "model", other)


@given(data=st.binary(max_size=300))
def test_any_bytes_are_no_adapter(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    path.write_bytes(data)
    (path.parent / PEFT_CONFIG).write_bytes(data)
    (path.parent / PEFT.file).write_bytes(data)
    for read, place in ((read_adapter, path), (read_lora, path), (read_peft, path.parent)):
        with pytest.raises(BadInput):
            read(place)
