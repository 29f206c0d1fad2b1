"""Draws follow from the seed; the bank is read as written; broken banks are refused."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dit.contract import bank
from edge_dit.contract.bank import Bank, Crop, Draw, Index, Listed
from edge_dit.contract.objective import FlowMatching
from edge_dit.errors import BadInput
from edge_dit.pictures.crop import CropRule
from edge_dit.pictures.draws import Drawn, DrawRule
from edge_dit.store.documents import write_document

LEVELS = FlowMatching((np.arange(1, 1001) / 1000).astype(np.float32))


def draws(count: int, seed: int = 0) -> list[Draw]:
    sizes = [(64, 64), (64, 90), (80, 64)]
    pictures = [Drawn(size, (prompt,)) for size, prompt in zip(sizes, (0, 1, 0), strict=True)]
    return DrawRule(seed, LEVELS.level, pictures, CropRule(32, 64, 8)).draws(count)


def tensors(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    return {"entry": rng.random((1, 4, 8), np.float32), "target": rng.random((1, 2), np.float32)}


def write(folder, count=5, plan_hash="plan"):
    index = Index(plan_hash, [Listed("a", "0")], ["red", "blue"], draws(count))
    missing = bank.begin(folder, index)
    bank.write_prompts(folder, [{"cond.x": np.full((1, 2), p, np.float32)} for p in range(2)])
    for shard in missing:
        members = range(shard * bank.SHARD, min((shard + 1) * bank.SHARD, count))
        bank.write_shard(folder, shard, {n: tensors(n) for n in members})
    return index


@given(count=st.integers(1, 200), seed=st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None)
def test_draws_follow_from_the_seed_and_a_longer_bank_starts_the_same(count, seed):
    assert draws(count, seed) == draws(count + 7, seed)[:count]
    for draw in draws(count, seed):
        assert 0 < draw.sigma <= 1
        assert 32 <= draw.crop.side <= 64


def test_seeds_differ_between_draws_and_banks():
    seeds = {draw.seed for seed in range(20) for draw in draws(50, seed)}
    assert len(seeds) == 20 * 50


def test_every_image_sees_every_noise_level():
    for image in range(3):
        sigmas = [draw.sigma for draw in draws(120) if draw.image == image]
        counts, _ = np.histogram(sigmas, bins=8, range=(0, 1))
        assert counts.min() >= 4, counts  # 40 draws in 8 bins: 5 each if perfectly even


def test_read_as_written(tmp_path):
    write(tmp_path / "bank", count=bank.SHARD + 3)
    opened = Bank(tmp_path / "bank", "plan")
    assert len(opened) == bank.SHARD + 3
    for number in (0, bank.SHARD - 1, bank.SHARD, bank.SHARD + 2):
        found = opened[number]
        for name, value in tensors(number).items():
            np.testing.assert_array_equal(found[name], value)
        assert found["cond.x"][0, 0] == opened.index.draws[number].prompt


@given(
    sigma=st.floats(0, 1),
    u=st.floats(0, 1, width=32),
    seed=st.integers(0, 2**31),
    top=st.integers(),
)
def test_index_keeps_every_bit(tmp_path_factory, sigma, u, seed, top):
    folder = tmp_path_factory.mktemp("bank") / "bank"
    index = Index("p", [], ["x"], [Draw(seed, 0, 0, sigma, u, u, Crop(top, 0, 8))])
    bank.begin(folder, index)
    assert bank.read_index(folder) == index


def test_a_stopped_bank_goes_on_with_the_first_missing_shard(tmp_path):
    index = write(tmp_path / "bank", count=3 * bank.SHARD)
    bank.shard_path(tmp_path / "bank", 1).unlink()
    with pytest.raises(BadInput, match=r"incomplete.*shard-00001"):
        Bank(tmp_path / "bank")
    assert bank.begin(tmp_path / "bank", index) == [1]


def test_another_plan_is_refused_for_writing_and_for_reading(tmp_path):
    index = write(tmp_path / "bank")
    other = Index(**{**asdict(index), "plan_hash": "other", "draws": index.draws})
    with pytest.raises(BadInput, match="another plan"):
        bank.begin(tmp_path / "bank", other)
    with pytest.raises(BadInput, match="belongs to another plan"):
        Bank(tmp_path / "bank", "other")


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(BadInput, match="not empty, and not a bank"):
        write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_damaged_shard_is_named(tmp_path):
    write(tmp_path / "bank")
    path = bank.shard_path(tmp_path / "bank", 0)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(BadInput, match="shard-00000"):
        Bank(tmp_path / "bank")[0]


@given(data=st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_any_bytes_as_index_are_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("bank")
    (folder / bank.INDEX).write_bytes(data)
    with pytest.raises(BadInput):
        bank.read_index(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["schema_version", "draws", "images"]), inner)
    ),
    max_leaves=8,
)


@given(value=json_values)
def test_any_json_as_index_is_refused(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("bank")
    if isinstance(value, dict):
        write_document(folder / bank.INDEX, value)  # what it holds must be refused, not its digest
    else:
        (folder / bank.INDEX).write_text(json.dumps(value))
    with pytest.raises(BadInput):
        bank.read_index(folder)


@given(st.floats(-1e6, 1e6, width=32), st.sampled_from(["float32", "float16"]))
def test_float16_halves_what_it_can_hold_and_is_read_as_float32(tmp_path_factory, value, dtype):
    folder = tmp_path_factory.mktemp("bank")
    draw = {"entry": np.full((1, 64, 8), value, np.float32), "cond.temb": np.ones(3, np.float32)}
    stored = bank.narrowed(draw, dtype)
    assert stored["cond.temb"].dtype == np.float32  # small, and read by every block
    fits = dtype == "float16" and abs(value) <= 65504
    assert stored["entry"].dtype == (np.float16 if fits else np.float32)
    index = bank.Index("hash", [Listed("a", "b")], ["p"], draws(1), dtype=dtype)
    bank.begin(folder, index)
    bank.write_prompts(folder, [{"cond.text": np.ones(2, np.float32)}])
    bank.write_shard(folder, 0, {0: stored})
    found = bank.Bank(folder)[0]
    assert all(tensor.dtype == np.float32 for tensor in found.values())
    np.testing.assert_allclose(found["entry"], draw["entry"], rtol=5e-4, atol=1e-7)
