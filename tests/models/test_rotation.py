"""Rotated products are the same products, and what stands out in one channel costs less in int8."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edge_dit.models.int8_products import computing_in_int8
from edge_dit.models.quantize import round_frozen
from edge_dit.models.rotation import hadamard, rotate, rotated_matrix, taken_for_rotated


@pytest.mark.parametrize("size", [1, 2, 8, 128])
def test_hadamard_is_symmetric_and_orthonormal(size):
    matrix = hadamard(size)
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size))
    torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5))


@given(st.integers(1, 300), st.integers(1, 5))
def test_a_rotation_is_its_own_inverse_and_keeps_lengths(channels, rows):
    x = torch.randn(2, rows, channels, generator=torch.Generator().manual_seed(channels))
    torch.testing.assert_close(rotate(rotate(x)), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotate(x).norm(dim=-1), x.norm(dim=-1), atol=1e-5, rtol=1e-5)


def test_its_gradient_is_that_of_the_matrix():
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rotate, (x,))


def layers():
    torch.manual_seed(0)
    return nn.Linear(96, 40), nn.Conv2d(96, 40, 1)


@pytest.mark.parametrize("number", [0, 1])
def test_a_layer_gives_the_same_with_a_rotated_weight(number):
    layer = layers()[number].requires_grad_(False)
    x = torch.randn(1, 96, 5, 4) if number else torch.randn(2, 7, 96)
    before = layer(x)
    layer.weight.data = rotated_matrix(layer.weight.data)
    holder = nn.ModuleList([layer])
    with taken_for_rotated([holder, holder]):
        torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=1e-5)
    assert type(layer) in (nn.Linear, nn.Conv2d)
    assert (layer(x) - before).abs().max() > 0.1


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("number", [0, 1])
def test_outliers_cost_less(number, rows):
    """One channel thirty times as large as the others: activations are rounded to its range."""
    x = torch.randn(1, 96, 12, 12) if number else torch.randn(1, 144, 96)
    x.movedim(1 if number else 2, 0)[5] *= 30
    error = {}
    for dtype in ("int8", "int8-rotated"):
        layer = layers()[number].requires_grad_(False)
        exact = layer(x)
        holder = nn.ModuleList([layer])
        round_frozen(holder, dtype)
        with computing_in_int8([holder], rows):
            error[dtype] = float((layer(x) - exact).norm() / exact.norm())
    assert error["int8-rotated"] < 0.75 * error["int8"], error


def test_rounding_twice_changes_nothing():
    layer = nn.Sequential(layers()[0].requires_grad_(False))
    round_frozen(layer, "int8-rotated")
    once = layer[0].weight.clone()
    round_frozen(layer, "int8-rotated")
    assert torch.equal(layer[0].weight, once)
