import pytest
import torch

from edge_dit.models.int8_products import (
    computing_in_int8,
    frozen_product,
    quantized,
    quantized_rows,
)
from edge_dit.models.quantize import rounded

ROWS = [False, True]


@pytest.fixture
def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("moved", [-40.0, 0.0, 0.3, 40.0])
def test_levels_are_within_half_a_step_and_zero_is_exact(seeded, rows, moved):
    x = torch.randn(32, 48, generator=seeded) * torch.logspace(-3, 3, 32)[:, None] + moved
    x[0] = 0
    x[:, 5] = 0
    levels, scale = (quantized_rows if rows else quantized)(x)
    assert torch.equal(levels, levels.round())
    assert (levels.amax(-1) - levels.amin(-1)).max() <= 255
    assert not levels[:, 5].any()
    # The zero point is rounded too: at an end of the range a value may lie a whole step away.
    assert ((levels * scale - x).abs() <= 1.001 * scale).all()
    inner = (levels > levels.amin(-1, keepdim=True)) & (levels < levels.amax(-1, keepdim=True))
    assert ((levels * scale - x).abs() <= 0.501 * scale)[inner].all()


@pytest.mark.parametrize("rows", ROWS)
def test_products_go_both_ways_with_one_weight(seeded, rows):
    weight = rounded(torch.randn(24, 40, generator=seeded), "int8")
    x = torch.randn(16, 40, generator=seeded, requires_grad=True)
    dy = torch.randn(16, 24, generator=seeded)
    y = frozen_product(x, weight, False, rows)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, frozen_product(dy, weight, True, rows))
    for found, exact in ((y, x @ weight.T), (dx, dy @ weight)):
        assert 0 < (found - exact).norm() < 0.02 * exact.norm()


def test_rows_of_unlike_size_keep_their_digits(seeded):
    weight = rounded(torch.randn(24, 40, generator=seeded), "int8")
    x = torch.randn(2, 40, generator=seeded) * torch.tensor([[1.0], [1000.0]])
    exact = x @ weight.T

    def error(rows: bool) -> torch.Tensor:
        """Of the small row."""
        return (frozen_product(x, weight, False, rows) - exact)[0].norm() / exact[0].norm()

    assert error(rows=True) < 0.02 < error(rows=False)


def test_layers_are_what_they_were_afterwards():
    block = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Conv2d(3, 2, 1)).requires_grad_(
        False
    )
    kinds = [type(module) for module in block]
    with computing_in_int8([block], rows=True):
        assert all(module.rows for module in block)
    assert [type(module) for module in block] == kinds
    assert not any(hasattr(module, "rows") for module in block)
