from itertools import product

import numpy as np
import pytest
import torch
from onnx_graphs import kinds, parsed, run

from edge_dit.models.quantize import from_int4, to_int4
from edge_dit_export.passes_onnx import weights_in_fewer_bytes as module

RNG = np.random.default_rng(0)
N, K, M = 12, 16, 7


def made(place, turned, other_turned, addend):
    """A Gemm with the weight [N, K] at ``place``, and its other inputs."""
    flags = [turned, other_turned] if place == 0 else [other_turned, turned]
    contracted, side = (K, N) if turned == place else (N, K)
    sides = [side, M] if place == 0 else [M, side]
    natural = (contracted, M) if place == 0 else (M, contracted)
    shapes = {"x": natural[::-1] if other_turned else natural, "weight": (N, K)}
    inputs = ["weight", "x"] if place == 0 else ["x", "weight"]
    if addend:
        shapes["b"] = {"row": (sides[1],), "column": (sides[0], 1), "all": tuple(sides)}[addend]
        inputs.append("b")
    typed = [f"float{list(shape)} {name}" for name, shape in shapes.items()]
    factors = ", ".join("minus" if name == "x" else name for name in inputs)
    model = parsed(f"""
        g ({", ".join(typed)}) => (float{sides} y)
        <float{list(shapes["x"])} minus>
        {{
            minus = Neg (x)
            y = Gemm <transA = {flags[0]}, transB = {flags[1]}> ({factors})
        }}
    """)
    feeds = {n: RNG.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    return model, feeds


def quantised(weight):
    scale = np.abs(weight).max(1) / 127
    return np.round(weight / scale[:, None]).astype(np.int8), scale.astype(np.float32)


@pytest.mark.parametrize("dtype", ["int8", "float16", "int4"])
@pytest.mark.parametrize(
    ("place", "turned", "other_turned", "addend"),
    [*product((0, 1), (0, 1), (0, 1), ("", "row", "column", "all"))],
)
def test_a_product_in_pieces_is_the_product(
    monkeypatch, dtype, place, turned, other_turned, addend
):
    monkeypatch.setattr(module, "PIECE", 4 * N * K // 3)  # three pieces
    model, feeds = made(place, turned, other_turned, addend)
    small = {**feeds}
    if dtype == "int8":
        small["weight"], small["weight.scale"] = quantised(feeds["weight"])
        stored = small["weight"] * small["weight.scale"][:, None]
    elif dtype == "int4":
        packed, scale = to_int4(torch.from_numpy(feeds["weight"]))
        assert packed.shape == (N, K // 2)
        small["weight"], small["weight.scale"] = packed.numpy(), scale.numpy()
        stored = from_int4(packed, scale).numpy()
    else:
        small["weight"] = feeds["weight"].astype(np.float16)
        stored = small["weight"].astype(np.float32)
    want = run(model, {**feeds, "weight": stored})[0]
    assert kinds(model) == ["Neg", "Gemm"]
    assert module.weights_in_fewer_bytes(model, {"weight": dtype}) == 1
    assert kinds(model).count("Gemm") == 3
    halves = 3 if dtype == "int4" else 0  # of bytes, put together
    assert kinds(model).count("Concat") - halves == (1 if turned == place else 0)
    np.testing.assert_allclose(run(model, small)[0], want, rtol=1e-5, atol=1e-6)


def test_small_weights_stay_whole():
    model, feeds = made(1, 1, 0, "row")
    weight, scale = quantised(feeds["weight"])
    want = run(model, {**feeds, "weight": weight * scale[:, None]})[0]
    module.weights_in_fewer_bytes(model, {"weight": "int8"})
    assert kinds(model).count("Gemm") == 1
    have = run(model, {**feeds, "weight": weight, "weight.scale": scale})[0]
    np.testing.assert_allclose(have, want, rtol=1e-6)
