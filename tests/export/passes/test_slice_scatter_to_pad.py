import pytest
import torch
from rewriting import rewrite, trace, train_step

from edge_dit_export.passes.slice_scatter_to_pad import slice_scatter_to_pad

FAR = 2**63 - 1


def test_train_step():
    before, after, count = rewrite(train_step(), slice_scatter_to_pad)
    assert count == 4
    assert (before["slice_scatter"], after["slice_scatter"]) == (4, 0)
    assert after["constant_pad_nd"] == before["constant_pad_nd"] + 4
    assert after["full"] == 0


def _scatter(dim, start, end, step=1, base=0.0):
    def function(x):
        return torch.slice_scatter(torch.full((4, 7), base), x, dim, start, end, step)

    return function


@pytest.mark.parametrize(
    ("shape", "dim", "start", "end"),
    [((4, 2), 1, -2, FAR), ((4, 6), 1, 0, -1), ((2, 7), 0, 1, 3), ((4, 3), -1, 2, 5)],
)
def test_any_dimension_and_range(shape, dim, start, end):
    graph = trace(_scatter(dim, start, end), torch.randn(shape))
    _, after, count = rewrite(graph, slice_scatter_to_pad)
    assert count == 1
    assert after["slice_scatter"] == 0


def test_other_scatters_are_left():
    for function in (_scatter(1, 0, 6, step=2), _scatter(1, 0, 3, base=1.0)):
        _, after, count = rewrite(trace(function, torch.randn(4, 3)), slice_scatter_to_pad)
        assert count == 0
        assert after["slice_scatter"] == 1
