import pytest
import torch
from rewriting import rewrite

from edge_dit.models.rotation import rotate
from edge_dit_export.graph.trace import trace
from edge_dit_export.passes.rotations_to_mm import rotations_to_mm


@pytest.mark.parametrize("turned", [False, True])
def test_rotations_and_their_gradients_become_products(turned):
    def step(tensors):
        x = tensors["x"].detach().requires_grad_()
        with torch.enable_grad():
            y = rotate(x.permute(0, 2, 1) if turned else x)
            return y.detach(), torch.autograd.grad((y * tensors["dy"]).sum(), x)[0]

    x = torch.randn(1, 48, 5) if turned else torch.randn(1, 5, 48)
    inputs = {"x": x, "dy": torch.randn(1, 5, 48)}
    graph = trace(step, inputs)
    before, after, count = rewrite((graph, [*inputs.values()]), rotations_to_mm, tolerance=1e-6)
    assert count == before["rotate"] == after["mm"] == 2
    assert not after["rotate"]
    assert [name for name, _ in graph.named_buffers()] == ["hadamard_16"]
