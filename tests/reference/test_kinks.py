"""Adapters are moved to where PyTorch's gradients do not jump, and no further."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from edge_dit.reference import kinks
from edge_dit.reference.eager import lora_tensors
from edge_dit.reference.kinks import nudge_from_kinks
from tiny import TARGETS, eager, subgraph
from variants import VARIANTS, case, with_lora
from variants import subgraph as subgraph_of

MARGIN = 2e-3
"""A hundred times the real one: a small model then has values within it."""


def arrays(batch):
    return {name: value.numpy() for name, value in batch.items()}


def nearest(sub, batch):
    """The least |value| / root mean square before any ReLU."""
    found = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.relu.default:
                rms = args[0].square().mean().sqrt()
                found.append(float(args[0].abs().min() / rms))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        sub.predict(batch)
    return min(found)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1e-5, 1e-4, 1e-3, 5e-3]))
@example(17310, 5e-3)
def test_no_value_is_left_close_to_zero(seed, margin):
    sub, batch = subgraph()
    generator = torch.Generator().manual_seed(seed)
    batch["entry"] = torch.randn(batch["entry"].shape, generator=generator)
    before = lora_tensors(sub)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinks, "MARGIN", margin)
        rows = nudge_from_kinks(sub, arrays(batch))
    after = lora_tensors(sub)
    if rows is None:  # so far from zero, 250 times as far as verify asks for, not always
        assert margin == 5e-3
        for name, value in after.items():
            assert np.array_equal(value, before[name])
        return
    assert nearest(sub, batch) >= 0.99 * margin
    for name, value in after.items():
        numbers, values = rows.get(name, (np.array([], np.int64), value[:0]))
        assert np.array_equal(value[numbers], values)
        others = np.delete(np.arange(len(value)), numbers)
        assert np.array_equal(value[others], before[name][others])
        assert not numbers.size or (value[numbers] != before[name][numbers]).any(axis=1).all()
        assert np.abs(value - before[name]).max() < 10 * kinks.MOVE * kinks.TRIES


def test_gradients_that_rounding_decides_are_settled():
    """One query is zero but for rounding: a nudge of the entry to either side decides it."""
    sub, batch = subgraph()
    module = sub.get_submodule("transformer_blocks.1.attn1.to_q")
    seen = []
    handle = module.register_forward_hook(lambda _m, args, output: seen.append((args[0], output)))
    sub.predict(batch)
    handle.remove()
    x, query = (tensor.detach()[0, 0] for tensor in seen[0])
    module.base_layer.weight.data[0] -= query[0] * x / x.square().sum()
    nudge = 2e-6 * torch.randn(batch["entry"].shape, generator=torch.Generator().manual_seed(0))

    def disagreement():
        plus, minus = (
            eager(sub, {**batch, "entry": batch["entry"] * (1 + sign * nudge)}) for sign in (1, -1)
        )
        return max(float((plus[n] - minus[n]).abs().max() / plus[n].abs().max()) for n in plus)

    assert nearest(sub, batch) < 1e-6
    assert disagreement() > 1e-3
    rows = nudge_from_kinks(sub, arrays(batch))
    assert [list(numbers) for numbers, _ in rows.values()] == [[0]]
    assert disagreement() < 1e-4


def test_without_lora_there_the_adapter_stays_as_it_was(monkeypatch):
    monkeypatch.setattr(kinks, "MARGIN", 0.05)
    sub, batch = subgraph(targets=tuple(t for t in TARGETS if t != "attn1.to_k"))
    before = lora_tensors(sub)
    assert nudge_from_kinks(sub, arrays(batch)) is None
    after = lora_tensors(sub)
    assert all(np.array_equal(before[name], after[name]) for name in before)


JUMPING = {
    "relu",
    "relu6",
    "leaky_relu",
    "hardtanh",
    "hardswish",
    "hardsigmoid",
    "threshold",
    "abs",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_families_name_what_lies_before_their_relus(variant):
    made = case(variant)
    trained = range(len(made.family.blocks(made.model)))
    with_lora(made, trained)
    sub, batch = subgraph_of(made, trained)
    counted = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__.rstrip("_") in JUMPING:
                counted.append(func)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Count():
        sub.predict(batch)
    ends = tuple(f".{name}" for name in made.family.before_relu)
    assert len(counted) == sum(name.endswith(ends) for name, _ in sub.named_modules())
    assert nudge_from_kinks(sub, arrays(batch)) is not None


@pytest.mark.parametrize("tail", ["fresh", "through"])
def test_a_tail_counts_only_where_a_gradient_goes_through_it(tail):
    """Its blocks have no LoRA, so that nothing can be moved there."""
    sub, batch = subgraph(tail=tail)
    sub.get_submodule("transformer_blocks.3.attn1.to_q").weight.data[0] = 0  # a query of zero
    rows = nudge_from_kinks(sub, arrays(batch))
    assert (rows is None) == (tail == "through")
