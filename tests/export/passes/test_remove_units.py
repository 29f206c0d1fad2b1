import torch
from rewriting import rewrite, trace, train_step

from edge_dit_export.passes.remove_units import remove_units


def test_train_step():
    before, after, count = rewrite(train_step(), remove_units)
    # attn2's rescale_output_factor, forward and backward, in two blocks; d loss / d loss.
    assert count == 5
    assert after["div"] == before["div"] - 4
    assert after["mul"] == before["mul"] - 1


def test_what_changes_shape_or_type_is_left():
    for function in (
        lambda x: x * torch.full((2, 3), 1.0),
        lambda x: x.to(torch.int64) * 1.0,
        lambda x: x * 2.0,
    ):
        _, after, count = rewrite(trace(function, torch.ones(3)), remove_units)
        assert count == 0
        assert after["mul"] == 1
