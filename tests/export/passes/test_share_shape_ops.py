import torch
from rewriting import rewrite, trace, train_step

from edge_dit_export.passes.share_shape_ops import share_shape_ops


def test_train_step_keeps_its_arithmetic():
    before, after, count = rewrite(train_step(), share_shape_ops)
    assert count == sum(before.values()) - sum(after.values())
    assert count > 10
    assert after["sigmoid"] == before["sigmoid"]
    assert after["mm"] == before["mm"]


def test_only_equal_ones_are_shared():
    def function(x):
        return x.view(6) + x.view(6) + x.view(1, 6).view(6) + x.t().reshape(6)

    before, after, count = rewrite(trace(function, torch.randn(2, 3)), share_shape_ops)
    assert count == 1
    assert after["view"] == before["view"] - 1
