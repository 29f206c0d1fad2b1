"""The contract of a family, the same for every variant."""

import inspect

import pytest
import torch

import tiny
import variants
from edge_dit.contract.names import AT_HEAD, read_by, read_in
from edge_dit.models.families import family_of
from edge_dit.models.families.parts.joined import Joined
from variants import GRID, SPLITS, VARIANTS

ALL = pytest.mark.parametrize("variant", VARIANTS)
JOINED = [name for name, (kind, _) in VARIANTS.items() if isinstance(family_of(kind), Joined)]


@ALL
def test_replay_with_nothing_skipped_is_the_stock_forward(variant):
    made = variants.case(variant)
    sub, batch = variants.subgraph(made, range(4))
    # A bank stores rows, while SANA's embedding, a convolution, gives columns: on some processors
    # a GEMM adds those up in another order. To the bit means with the stock forward's own strides.
    # And rotations are rounded to float32, where diffusers keeps Lumina2's in float64.
    entry, cond = made.family.begin(made.model, made.inputs)
    assert torch.equal(batch["entry"], entry.image)
    begun = {"entry": entry.image, **{f"cond.{name}": value for name, value in cond.items()}}
    with torch.no_grad():
        expected = made.family.forward(made.model, made.inputs)
        found = sub.predict({**batch, **begun})
    assert torch.equal(found, expected)


@ALL
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_entry_state_trained_blocks_and_tail_residual_give_the_stock_forward(variant, split):
    made = variants.case(variant)
    sub, batch = variants.subgraph(made, split)
    with torch.no_grad():
        expected = made.family.forward(made.model, made.inputs)
        found = sub.predict(batch)
    assert (found - expected).abs().max() < 1e-5
    assert expected.abs().max() > 0.1


@ALL
@pytest.mark.parametrize("head_skip", [0, 1, 2, 3])
def test_gradients_are_the_stock_models_when_no_tail_is_skipped(variant, head_skip):
    made = variants.case(variant)
    variants.with_lora(made, range(head_skip, 4))
    expected = variants.stock_gradients(made)
    sub, batch = variants.subgraph(made, range(head_skip, 4))
    found = tiny.eager(sub, batch)
    tiny.assert_close({f"grad.{name}": value for name, value in expected.items()}, found, 1e-5)
    assert all(value.abs().max() > 0 for value in expected.values())


@ALL
def test_no_lora_is_put_where_the_loss_does_not_reach(variant):
    """Every LoRA tensor has a gradient, and every left-out module of the last block has none."""
    for split in SPLITS.values():
        made = variants.case(variant)
        variants.with_lora(made, split)
        sub, batch = variants.subgraph(made, split)
        sub(batch).backward()
        assert all(_reached(p) for p in sub.lora_parameters().values())
        last = sub.get_submodule(sub.order[-1])
        if split[-1] < 3:  # what is left out there is out of the loss's reach indeed
            for name in made.family.text_output:
                module = dict(last.named_modules()).get(name)
                if module is not None:
                    module.requires_grad_(True)
            sub.zero_grad()
            sub(batch).backward()
            for name in made.family.text_output:
                module = dict(last.named_modules()).get(name)
                assert module is None or not any(_reached(p) for p in module.parameters())


def _reached(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.abs().max() > 0)


@ALL
def test_every_block_gets_what_the_stock_forward_calls_it_with(variant):
    made = variants.case(variant)
    family, calls = made.family, []
    handles = [
        block.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((type(module), args, kwargs)),
            with_kwargs=True,
        )
        for block in family.blocks(made.model).values()
    ]
    with torch.no_grad():
        made.family.forward(made.model, made.inputs)
    for handle in handles:
        handle.remove()
    cond = family.begin(made.model, made.inputs)[1]
    for name, (kind, args, kwargs) in zip(family.blocks(made.model), calls, strict=True):
        bound = inspect.signature(kind.forward).bind(None, *args, **kwargs).arguments
        stock = {k: v for k, v in bound.items() if k not in {"self", *family.streams} and told(v)}
        ours = {k: v for k, v in family.arguments(read_by(name, cond), GRID).items() if told(v)}
        # FLUX.2's single blocks give the two streams back only if they are told to.
        assert ours.keys() - {"split_hidden_states"} == stock.keys()
        for key, value in stock.items():
            assert same(ours[key], value), (name, key)
    assert cond.keys() == read_in([*family.blocks(made.model), AT_HEAD], cond).keys()


def told(value) -> bool:
    return torch.is_tensor(value) or value not in (None, {})


def same(one, other) -> bool:
    if isinstance(one, tuple):
        return all(map(same, one, other))
    if torch.is_tensor(one):
        return torch.equal(one.to(other.dtype), other)
    return one == other


@pytest.mark.parametrize("variant", JOINED)
def test_a_traced_beginning_is_that_of_the_stock_forward(variant):
    made = variants.case(variant)
    entry, cond = made.family.begin(made.model, made.inputs)
    with made.family.traceable():
        state, named = made.family.begin(made.model, made.inputs)
    torch.testing.assert_close(tuple(state), tuple(entry), atol=1e-5, rtol=1e-5)
    # diffusers keeps Lumina2's rotations in float64
    torch.testing.assert_close(named, cond, atol=1e-6, rtol=1e-5, check_dtype=False)


@ALL
def test_begin_leaves_the_model_as_it_was(variant):
    made = variants.case(variant)
    before = made.model.state_dict().keys()
    with torch.no_grad():
        expected = made.family.forward(made.model, made.inputs)
    made.family.begin(made.model, made.inputs)
    assert made.model.state_dict().keys() == before
    with torch.no_grad():
        assert torch.equal(made.family.forward(made.model, made.inputs), expected)
