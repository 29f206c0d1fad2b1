import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from edge_dit.contract.adamw import AdamW
from edge_dit_export.graph import optimizer
from edge_dit_export.graph.optimizer import AdamWStep, _bias_correction

SHAPES = {
    "a.lora_A.weight": (4, 32),
    "a.lora_B.weight": (32, 4),
    "b.lora_A.weight": (7, 4),
    "d": (5,),
    "e.lora_B.weight": (1, 32),
    "f": (4, 3, 1, 1),
}


def gradients(generator: torch.Generator, update: int) -> list[torch.Tensor]:
    """Random gradients; every third update is far above the clipping norm, some far below."""
    scale = (1e-3, 1e-2, 10.0)[update % 3]
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES.values()]


@pytest.mark.parametrize("together", [1, 150, optimizer.TOGETHER])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize(("lr", "ratio"), [(1e-4, 1.0), (1e-2, 1.0), (1e-4, 16.0)])
def test_equals_torch_adamw(lr, ratio, beta1, together, monkeypatch):
    monkeypatch.setattr(optimizer, "TOGETHER", together)
    generator = torch.Generator().manual_seed(0)
    hyper = AdamW(lr=lr, beta1=beta1, weight_decay=0.1, loraplus_lr_ratio=ratio)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES.values()]
    reference = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    rates = [lr * (ratio if "lora_B" in name else 1) for name in SHAPES]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(reference, rates, strict=True)]
    adamw = torch.optim.AdamW(groups, lr, (hyper.beta1, hyper.beta2), hyper.eps, hyper.weight_decay)
    step = AdamWStep(hyper, SHAPES)
    count = len(SHAPES)
    zeros = [torch.zeros_like(tensor) for tensor in start]
    state = [*start, *(zeros * len(hyper.moments))]
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
            f"{kind}{n}": adamw.state[p][kind[:-1]]
            for kind in hyper.moments
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
    factors = [1.0 + sum(shape) % 2 for shape in shapes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "TOGETHER", together)
        groups = optimizer._groups(sizes, factors)
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    for group in groups:
        assert group == sorted(group)
        assert len({(sizes[index][1:], factors[index]) for index in group}) == 1
        assert len(group) == 1 or sum(sizes[index].numel() for index in group) <= together
