"""Weights read once: their hash is the file's, and values that are not finite are found."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from edge_dit.errors import BadInput
from edge_dit.models import weights
from edge_dit.models.components import Weights
from edge_dit.models.weights import measure, stored_in

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = st.lists(st.integers(0, 5), max_size=3)
TENSORS = st.dictionaries(
    st.text("abc.", min_size=1, max_size=9),
    st.tuples(SHAPES, st.sampled_from([*DTYPES, torch.int64, torch.int8, torch.bool])),
    max_size=5,
)
REUSED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@REUSED
@given(TENSORS, st.data())
def test_hash_and_finiteness(tmp_path: Path, kinds, data):
    """Against hashlib and torch, for any tensors; with chunks smaller than most of them."""
    tensors = {name: torch.ones(shape).to(dtype) for name, (shape, dtype) in kinds.items()}
    floating = sorted(n for n, t in tensors.items() if t.is_floating_point() and t.numel())
    spoiled = data.draw(st.sampled_from(["", *floating]))
    if spoiled:
        values = tensors[spoiled].view(-1)
        place = data.draw(st.integers(0, values.numel() - 1))
        values[place] = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "CHUNK", 16)
        measured = measure(path)
    assert measured.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert measured.not_finite == spoiled


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_finite_values_are_finite(tmp_path, dtype):
    info = torch.finfo(dtype)
    values = torch.tensor([info.max, info.min, info.tiny, -0.0], dtype=dtype)
    save_file({"a": values}, tmp_path / "x.safetensors")
    assert measure(tmp_path / "x.safetensors").not_finite == ""


@REUSED
@given(st.data())
def test_a_damaged_header_is_refused_or_read_and_raises_nothing_else(tmp_path: Path, data):
    """Flipped, cut and inserted bytes in the header."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4), "b.weight": torch.ones(2, 3).half()}, path, {"format": "pt"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    path.write_bytes(content)
    for read in (lambda: stored_in(Weights(None, None, (path,), {})), lambda: measure(path)):
        with suppress(BadInput):
            read()


def test_an_unchanged_file_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights._remembered.cache_clear()
    read = []
    real = weights._measure
    monkeypatch.setattr(weights, "_measure", lambda path: read.append(path) or real(path))
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.tensor([1.0, float("nan")])}, path)
    long_ago = path.stat().st_mtime - 100
    os.utime(path, (long_ago, long_ago))
    monkeypatch.setattr("edge_dit.store.remembered.time.time", lambda: long_ago + 1e6)
    found = measure(path)
    weights.keep_measured()
    weights._remembered.cache_clear()  # as in another process
    assert measure(path) == found
    assert found.not_finite == "a"
    assert read == [path]
    save_file({"a": torch.tensor([1.0, 2.0])}, path)
    assert measure(path).not_finite == ""
    assert read == [path, path]
    cache = tmp_path / "cache" / "edge-dit" / "weights.json"
    for content in ("[", json.dumps({str(path): 3}), json.dumps({str(path): [1, [2]]})):
        cache.write_text(content)
        weights._remembered.cache_clear()
        assert measure(path).not_finite == ""
    weights._remembered.cache_clear()
