import numpy as np
from onnx_graphs import kinds, parsed, run
from onnx_ir.passes.common import ShapeInferencePass

from edge_dit_export.passes_onnx.cast_like_to_cast import cast_like_to_cast

SCALED = """
scaled (float[2] x, int64[2] n) => (float[2] y, int64[2] whole, float[2] copy)
<float[1] half = {0.5}, float[2] number = {2.5, 3.5}>
{
    twice = Add (x, x)
    scale = CastLike (half, twice)
    y = Mul (x, scale)
    whole = CastLike (number, n)
    copy = CastLike (x, x)
}
"""
"""A scale, a conversion, and a copy that is an output."""


def test_values_stay_and_cast_like_goes():
    model = ShapeInferencePass()(parsed(SCALED)).model
    feeds = {"x": np.array([1.0, 2.0], np.float32), "n": np.array([0, 0])}
    before = run(model, feeds)
    assert kinds(model) == ["Add", "CastLike", "Mul", "CastLike", "CastLike"]

    assert cast_like_to_cast(model) == 3
    # Nothing is left of the first; the third is an output, whose name must stay.
    assert kinds(model) == ["Add", "Mul", "Cast", "Cast"]
    assert [value.name for value in model.graph.outputs] == ["y", "whole", "copy"]
    for want, have in zip(before, run(model, feeds), strict=True):
        assert want.dtype == have.dtype
        np.testing.assert_array_equal(have, want)


def test_one_of_unknown_type_stays():
    model = parsed(SCALED)
    assert cast_like_to_cast(model) == 2
    assert kinds(model) == ["Add", "CastLike", "Mul", "Cast", "Cast"]
