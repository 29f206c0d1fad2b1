from itertools import product

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edge_dit_export.passes_onnx import weights_in_fewer_bytes as module

RNG = np.random.default_rng(0)
N, K, M = 12, 5, 7


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
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Neg", ["x"], ["minus"]),
            helper.make_node(
                "Gemm",
                ["minus" if name == "x" else name for name in inputs],
                ["y"],
                transA=flags[0],
                transB=flags[1],
            ),
        ],
        "g",
        [value(n, TensorProto.FLOAT, s) for n, s in shapes.items()],
        [value("y", TensorProto.FLOAT, sides)],
        value_info=[value("minus", TensorProto.FLOAT, shapes["x"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    feeds = {n: RNG.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    return model, feeds


def run(model, feeds):
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0]


def quantised(weight):
    scale = np.abs(weight).max(1) / 127
    return np.round(weight / scale[:, None]).astype(np.int8), scale.astype(np.float32)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
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
    else:
        small["weight"] = feeds["weight"].astype(np.float16)
        stored = small["weight"].astype(np.float32)
    want = run(model, {**feeds, "weight": stored})
    rewritten = ir.from_proto(model)
    assert module.weights_in_fewer_bytes(rewritten, ["weight"], dtype) == 1
    after = ir.to_proto(rewritten)
    kinds = [node.op_type for node in after.graph.node]
    assert kinds.count("Gemm") == 3
    assert kinds.count("Concat") == (1 if turned == place else 0)
    np.testing.assert_allclose(run(after, small), want, rtol=1e-5, atol=1e-6)


def test_small_weights_stay_whole():
    model, feeds = made(1, 1, 0, "row")
    rewritten = ir.from_proto(model)
    module.weights_in_fewer_bytes(rewritten, ["weight"], "int8")
    after = ir.to_proto(rewritten)
    assert [node.op_type for node in after.graph.node].count("Gemm") == 1
    weight, scale = quantised(feeds["weight"])
    want = run(model, {**feeds, "weight": weight * scale[:, None]})
    have = run(after, {**feeds, "weight": weight, "weight.scale": scale})
    np.testing.assert_allclose(have, want, rtol=1e-6)
