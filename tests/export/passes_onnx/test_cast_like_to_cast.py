import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from edge_dit_export.passes_onnx.cast_like_to_cast import cast_like_to_cast


def scaled():
    """A scale, a conversion, and a copy that is an output."""
    nodes = [
        helper.make_node("Add", ["x", "x"], ["twice"]),
        helper.make_node("CastLike", ["half", "twice"], ["scale"]),
        helper.make_node("Mul", ["x", "scale"], ["y"]),
        helper.make_node("CastLike", ["number", "n"], ["whole"]),
        helper.make_node("CastLike", ["x", "x"], ["copy"]),
    ]
    inputs = [("x", TensorProto.FLOAT), ("n", TensorProto.INT64)]
    outputs = [("y", TensorProto.FLOAT), ("whole", TensorProto.INT64), ("copy", TensorProto.FLOAT)]
    graph = helper.make_graph(
        nodes,
        "scaled",
        [helper.make_tensor_value_info(name, kind, [2]) for name, kind in inputs],
        [helper.make_tensor_value_info(name, kind, [2]) for name, kind in outputs],
        [
            numpy_helper.from_array(np.array([0.5], np.float32), "half"),
            numpy_helper.from_array(np.array([2.5, 3.5], np.float32), "number"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(model):
    feeds = {"x": np.array([1.0, 2.0], np.float32), "n": np.array([0, 0])}
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)


def test_values_stay_and_cast_like_goes():
    model = scaled()
    before = run(model)
    assert cast_like_to_cast(model) == 3
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    # Nothing is left of the first; the third is an output, whose name must stay.
    assert kinds == ["Add", "Mul", "Cast", "Cast"]
    for want, have in zip(before, run(model), strict=True):
        assert want.dtype == have.dtype
        np.testing.assert_array_equal(have, want)
