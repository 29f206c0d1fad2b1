"""Traced graphs hold no call that changes a tensor, and keep what such calls computed."""

import pytest
import torch

from edge_dit_export.graph.flat_program import flat_program
from edge_dit_export.graph.trace import trace

X = {"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}


def _gradient_of_norm(tensors):
    x = tensors["x"].requires_grad_()
    with torch.enable_grad():
        y = torch.nn.functional.rms_norm(x, (4,), eps=1e-6).square().mean(1).add_(2).exp()
        return torch.autograd.grad(y.sum(), [x])


def test_in_place_calls_become_functional():
    module = trace(_gradient_of_norm, X)
    mutable = [
        node
        for node in module.graph.nodes
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False)
    ]
    assert not mutable
    (found,) = module(X["x"])
    torch.testing.assert_close(found, _gradient_of_norm({"x": X["x"].clone()})[0])


def test_a_tensor_with_a_view_is_not_changed_in_place():
    def shared(tensors):
        y = tensors["x"] * 2
        view = y.view(-1)
        return y.add_(1), view

    with pytest.raises(NotImplementedError, match="other users"):
        trace(shared, X)


def test_a_flat_program_computes_what_its_graph_does():
    buffer = torch.arange(4.0)
    inputs = X | {"b": buffer}
    module = trace(lambda tensors: (tensors["x"] * tensors["b"], tensors["x"] + 1), inputs)
    for given in (module, flat_program(module, inputs.values()).module()):
        product, total = given(X["x"], buffer)
        assert torch.equal(product, X["x"] * buffer)
        assert torch.equal(total, X["x"] + 1)
