import math

import torch
from rewriting import rewrite, train_step
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from edge_dit_export.passes import copy_of
from edge_dit_export.passes.safe_softmax_to_softmax import safe_softmax_to_softmax


def test_train_step():
    before, after, count = rewrite(train_step(), safe_softmax_to_softmax)
    assert count == 2
    assert (before["eq"], before["any"], before["logical_not"]) == (2, 2, 4)
    assert (after["eq"], after["any"], after["logical_not"]) == (0, 0, 0)
    # relu's gradients keep their four.
    assert (before["where"], after["where"]) == (6, 4)
    assert after["_softmax"] == before["_softmax"] == 2


def test_guard_stays_where_a_constant_is_infinite():
    def function(scores, blocked):
        masked = torch.where(blocked > 0, torch.full_like(scores, -math.inf), scores)
        return (torch.ops.aten._safe_softmax(masked, -1),)

    inputs = [torch.randn(2, 3), torch.tensor([[1.0, 1, 1], [0, 1, 0]])]
    module = copy_of(make_fx(function, decomposition_table=core_aten_decompositions())(*inputs))
    _, after, count = rewrite((module, inputs), safe_softmax_to_softmax)
    assert count == 0
    assert after["any"] == 1
    # Those of the mask; the guard's are one number.
    assert after["full_like"] == 1
    assert after["full"] == 1
