import numpy as np
import pytest
import torch
from onnx_graphs import kinds, parsed, run

from edge_dit_export.passes_onnx.partial_split_to_slice import partial_split_to_slice
from edge_dit_export.targets.onnx_model import onnx_model


class Parts(torch.nn.Module):
    """The first and last of three parts of x; both halves of y."""

    def forward(self, x, y):
        first, _, last = x.chunk(3, dim=-1)
        one, two = y.split([2, 5], dim=0)
        return first * last, one.sum() + two.sum()


def test_only_a_split_with_an_unused_part_becomes_slices():
    inputs = {"x": torch.randn(2, 12), "y": torch.randn(7, 3)}
    model = onnx_model(Parts(), inputs, ["product", "sum"])
    before = run(model, inputs)
    assert (kinds(model).count("Split"), kinds(model).count("Slice")) == (2, 0)

    assert partial_split_to_slice(model) == 1
    assert (kinds(model).count("Split"), kinds(model).count("Slice")) == (1, 2)
    for want, have in zip(before, run(model, inputs), strict=True):
        np.testing.assert_array_equal(have, want)


def test_parts_of_a_number_are_as_large_as_onnx_makes_them():
    x = torch.randn(2, 7)
    model = parsed("""
        g (float[2, 7] x) => (float[2, 1] last, float[2, 3] first)
        { first, middle, last = Split <axis = 1, num_outputs = 3> (x) }
    """)
    before = run(model, {"x": x})
    assert partial_split_to_slice(model) == 1
    assert kinds(model) == ["Slice", "Slice"]
    for want, have in zip(before, run(model, {"x": x}), strict=True):
        np.testing.assert_array_equal(have, want)


def test_sizes_that_are_not_constant_are_refused():
    model = parsed("""
        g (float[5] x, int64[2] sizes) => (float[N] first) { first, rest = Split (x, sizes) }
    """)
    with pytest.raises(ValueError, match="sizes are not known"):
        partial_split_to_slice(model)
