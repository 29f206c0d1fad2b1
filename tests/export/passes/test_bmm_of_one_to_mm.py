import torch
from rewriting import rewrite, trace, train_step

from edge_dit_export.passes.bmm_of_one_to_mm import bmm_of_one_to_mm


def test_train_step_keeps_products_per_head():
    before, after, count = rewrite(train_step(), bmm_of_one_to_mm, tolerance=1e-5)
    # attn1.to_out of two blocks, forward and backward, reads a non-contiguous tensor.
    assert count == 4
    assert after["bmm"] == before["bmm"] - 4
    assert after["mm"] == before["mm"] + 4


def test_batches_are_left():
    _, after, count = rewrite(
        trace(torch.bmm, torch.randn(2, 3, 4), torch.randn(2, 4, 5)), bmm_of_one_to_mm
    )
    assert count == 0
    assert after["bmm"] == 1
