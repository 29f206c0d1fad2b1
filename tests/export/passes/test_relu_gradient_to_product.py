import pytest
import torch
from rewriting import rewrite, trace, train_step

from edge_dit_export.passes.relu_gradient_to_product import relu_gradient_to_product
from edge_dit_export.targets.relu_gradient_to_sign import relu_gradient_to_sign

PASSES = pytest.mark.parametrize("to", [relu_gradient_to_product, relu_gradient_to_sign])


@PASSES
def test_train_step(to):
    before, after, count = rewrite(train_step(), to)
    assert count == 4  # queries and keys of two blocks
    assert after["where"] == before["where"] - 4
    assert after["le"] == 0


@PASSES
def test_values_at_zero(to):
    def gradient(y, dy):
        return torch.where(torch.ops.aten.le.Scalar(y, 0), torch.scalar_tensor(0.0), dy)

    y = torch.tensor([-1.0, -0.0, 0.0, 1e-45, 2.0])
    _, after, count = rewrite(trace(gradient, y, torch.ones(5)), to)
    assert count == 1
    assert after["where"] == 0


@PASSES
def test_another_choice_is_left(to):
    for function in (
        lambda y, dy: torch.where(torch.ops.aten.le.Scalar(y, 1), torch.scalar_tensor(0.0), dy),
        lambda y, dy: torch.where(torch.ops.aten.le.Scalar(y, 0), torch.scalar_tensor(2.0), dy),
        lambda y, dy: torch.where(torch.ops.aten.le.Scalar(y, 0), torch.scalar_tensor(0.0), dy[:1]),
    ):
        graph = trace(function, torch.randn(5), torch.randn(5))
        _, after, count = rewrite(graph, to)
        assert count == 0
        assert after["where"] == 1
