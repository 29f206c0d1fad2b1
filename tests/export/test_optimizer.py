import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from edge_dit.contract.adamw import AdamW
from edge_dit_export.graph import optimizer
from edge_dit_export.graph.optimizer import AdamWStep, _bias_correction

SHAPES = {"a": (4, 32), "b": (32, 4), "c": (7, 3), "d": (5,), "e": (1, 32), "f": (4, 3, 1, 1)}


def gradients(generator: torch.Generator, update: int) -> list[torch.Tensor]:
    """Random gradients; every third update is far above the clipping norm, some far below."""
    scale = (1e-3, 1e-2, 10.0)[update % 3]
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES.values()]


@pytest.mark.parametrize("together", [1, 150, optimizer.TOGETHER])
@pytest.mark.parametrize("lr", [1e-4, 1e-2])
def test_equals_torch_adamw(lr, together, monkeypatch):
    monkeypatch.setattr(optimizer, "TOGETHER", together)
    generator = torch.Generator().manual_seed(0)
    hyper = AdamW(lr=lr, weight_decay=0.1)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES.values()]
    reference = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    adamw = torch.optim.AdamW(
        reference, lr, (hyper.beta1, hyper.beta2), hyper.eps, hyper.weight_decay
    )
    step = AdamWStep(hyper, SHAPES)
    count = len(SHAPES)
    zeros = [torch.zeros_like(tensor) for tensor in start]
    state = [*start, *zeros, *zeros]
    for update in range(50):
        grads = gradients(generator, update)
        for parameter, grad in zip(reference, grads, strict=True):
            parameter.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(reference, hyper.max_grad_norm)
        adamw.step()
        done = torch.tensor([float(update)])
        state = list(step(torch.tensor([lr]), done, *state[:count], *grads, *state[count:]))
    expected = {
        **{f"{name}": p.detach() for name, p in zip(SHAPES, reference, strict=True)},
        **{
            f"exp_avg.{n}": adamw.state[p]["exp_avg"]
            for n, p in zip(SHAPES, reference, strict=True)
        },
        **{
            f"exp_avg_sq.{n}": adamw.state[p]["exp_avg_sq"]
            for n, p in zip(SHAPES, reference, strict=True)
        },
    }
    tiny.assert_close(expected, dict(zip(expected, state, strict=True)), 2e-6)


@pytest.mark.parametrize("beta", [0.9, 0.999, 0.9999])
def test_bias_correction_keeps_its_digits(beta):
    steps = torch.tensor([1.0, 2.0, 10.0, 1000.0, 100_000.0])
    exact = 1 - beta ** steps.to(torch.float64)
    torch.testing.assert_close(
        _bias_correction(beta, steps).to(torch.float64), exact, rtol=3e-7, atol=0
    )


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), max_size=12),
    st.integers(1, 200),
)
def test_groups_hold_every_tensor_once(shapes, together):
    sizes = [torch.Size(shape) for shape in shapes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "TOGETHER", together)
        groups = optimizer._groups(sizes)
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    for group in groups:
        assert group == sorted(group)
        assert len({sizes[index][1:] for index in group}) == 1
        assert len(group) == 1 or sum(sizes[index].numel() for index in group) <= together
