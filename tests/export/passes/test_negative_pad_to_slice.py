import pytest
import torch
from rewriting import rewrite, trace, train_step
from torch.nn.functional import pad

from edge_dit_export.passes.negative_pad_to_slice import negative_pad_to_slice


def test_train_step_keeps_real_pads():
    before, after, count = rewrite(train_step(), negative_pad_to_slice)
    assert count == 2
    # The two left pad V with ones in linear attention's forward.
    assert (before["constant_pad_nd"], after["constant_pad_nd"]) == (4, 2)


@pytest.mark.parametrize("pads", [(0, -1), (-2, 0), (-1, -1, 0, 0, 0, -2), (0, 0, -3, -1)])
def test_any_dimension_and_side(pads):
    x = torch.arange(120.0).reshape(4, 5, 6)
    _, after, count = rewrite(trace(lambda x: pad(x, pads), x), negative_pad_to_slice)
    assert count == 1
    assert after["constant_pad_nd"] == 0


def test_mixed_pads_are_left():
    _, after, count = rewrite(
        trace(lambda x: pad(x, (-1, 2)), torch.randn(3, 4)), negative_pad_to_slice
    )
    assert count == 0
    assert after["constant_pad_nd"] == 1
