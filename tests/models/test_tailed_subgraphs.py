"""The three ways to skip a tail block, against autograd of the same model."""

import pytest
import torch

import tiny
import variants
from edge_dit.contract.names import FRESH, STORED, TAIL_RESIDUAL, TAILS, THROUGH
from edge_dit.models.subgraph import TrainableSubgraph, add_lora, lora_modules
from variants import GRID, SPLITS, VARIANTS

ALL = pytest.mark.parametrize("variant", VARIANTS)
WITH_TAIL = pytest.mark.parametrize("split", ["start", "across"])


def adapted(variant, split, tail):
    """A variant with a non-zero LoRA B, its sub-graph and its draw."""
    made = variants.case(variant)
    variants.with_lora(made, SPLITS[split], tail=tail)
    return made, *variants.subgraph(made, SPLITS[split], tail=tail)


@ALL
@WITH_TAIL
def test_through_has_the_gradients_of_the_stock_forward(variant, split):
    made, sub, batch = adapted(variant, split, THROUGH)
    assert TAIL_RESIDUAL not in batch
    expected = variants.stock_gradients(made)
    found = tiny.eager(sub, batch)
    tiny.assert_close({f"grad.{name}": value for name, value in expected.items()}, found, 1e-5)
    assert all(value.abs().max() > 0 for value in expected.values())


@ALL
@WITH_TAIL
def test_fresh_is_stored_with_the_adapted_models_residual(variant, split):
    made, sub, batch = adapted(variant, split, FRESH)
    found = tiny.eager(sub, batch)
    trained = SPLITS[split]
    with torch.no_grad():
        states = [made.family.begin(made.model, made.inputs)[0]]
        _, cond = made.family.begin(made.model, made.inputs)
        for block in made.family.blocks(made.model).items():
            states.append(made.family.run_block(*block, states[-1], cond, GRID))
    residual = states[-1].image - states[trained[-1] + 1].image
    stored = TrainableSubgraph(made.model, made.family, trained, GRID)
    expected = tiny.eager(stored, {**batch, TAIL_RESIDUAL: residual})
    tiny.assert_close(expected, found, 1e-5)
    _, base = variants.subgraph(made, trained)  # the LoRA did move the residual
    assert (base[TAIL_RESIDUAL] - residual).abs().max() > 1e-3 * residual.abs().max()


@ALL
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_all_three_have_the_same_loss_before_training(variant, split):
    losses = {}
    for tail in TAILS:
        made = variants.case(variant)
        targets = made.family.lora_targets
        add_lora(made.model, lora_modules(made.family, made.model, split, targets, tail), 2, 3.0, 0)
        sub, batch = variants.subgraph(made, split, tail=tail)
        losses[tail] = float(sub(batch).detach())
    for tail in (FRESH, THROUGH):
        assert losses[tail] == pytest.approx(losses[STORED], rel=1e-6)


@ALL
@pytest.mark.parametrize("tail", [FRESH, THROUGH])
def test_lora_is_put_where_the_loss_reaches_and_nowhere_else(variant, tail):
    for split in SPLITS:
        made, sub, batch = adapted(variant, split, tail)
        sub(batch).backward()
        for name, parameter in sub.lora_parameters().items():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        last = SPLITS[split][-1]
        blocks = [*made.family.blocks(made.model).values()]
        inside = dict(blocks[last].named_modules())
        carried = {name for name in made.family.text_output if hasattr(inside.get(name), "lora_A")}
        reads = tail == THROUGH and last < 3
        wanted = set(made.family.text_output) & set(made.family.lora_targets)
        there = {name for name in wanted if name in inside}
        assert carried == (there if reads else set())


def test_the_tail_runs_only_where_it_is_not_stored():
    for tail, names in ((STORED, []), (FRESH, ["transformer_blocks.3"])):
        sub, _ = tiny.subgraph(tail=tail)
        assert sub.after == names
        kept = {name.split(".")[1] for name, _ in sub.named_parameters() if "blocks." in name}
        assert kept == {"1", "2", *(name.split(".")[1] for name in names)}
