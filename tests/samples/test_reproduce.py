"""samples/reproduce: training side by side, what each arm is, and the arithmetic of its tables."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tiny
from edge_dit.budget.cost import shapes_of
from edge_dit.contract.adamw import AdamW
from edge_dit.contract.bank import Crop, Draw
from edge_dit.contract.names import TAILS
from edge_dit.models.families import family_of
from edge_dit.models.families.family import State
from edge_dit.models.subgraph import (
    TrainableSubgraph,
    add_lora,
    frozen_layers,
    lora_modules,
    lora_name,
    residual_names,
)
from edge_dit.pictures.window import Window, WindowRule
from edge_dit.reference.eager import EagerSession

sys.path.append(str(Path(__file__).resolve().parents[2] / "samples"))
sys.path.append(str(Path(__file__).resolve().parents[2] / "samples" / "reproduce"))

import experiment
import measures
import pages
import tables
from arms import ARMS, CLAIMS, CROPS, NO_LORA, Claim, Skips, lora_blocks, ranks_by_block
from context import around, counting, surroundings_of
from draws import Through, cut, inside, spread, stored, told
from everything import stages
from experiment import how_selected, settings
from four_bits import (
    STARTS,
    Parts,
    begin_in_four_bits,
    end_in_four_bits,
    error,
    in_four_bits,
    measuring,
)
from run import JOBS, SAMPLES, Run, all_runs, is_done, perform, take_known
from runs import plan_of
from side_by_side import ManyLora, ManySessions, add_many_lora, joined, remove_many_lora

RANK, ALPHA = 4, 8.0
ADAMW = AdamW(lr=1e-2, weight_decay=0.01, max_grad_norm=0.1)
unit = st.floats(0, 1)

# ---------------------------------------------------------------- side by side


def draw(seed: int, trained: tuple[int, ...]) -> dict[str, Tensor]:
    """A draw with random contents, for any blocks of `tiny.transformer`."""
    _, batch = tiny.subgraph()
    generator = torch.Generator().manual_seed(seed)
    new = dict(batch)
    for name in ("entry", "tail_residual", "target"):
        new[name] = torch.randn(batch[name].shape, generator=generator)
    if trained[-1] - trained[0] >= len(trained):
        inner = residual_names(trained[0] + 1)[0]
        new[inner] = torch.randn(batch["entry"].shape, generator=generator)
    return new


@pytest.mark.parametrize("trained", [(1, 2), (0, 3)])
def test_runs_side_by_side_are_those_of_eager_sessions(trained: tuple[int, ...]) -> None:
    steps, runs = 3, 2
    draws = [[draw(10 * run + step, trained) for run in range(runs)] for step in range(steps)]

    model = tiny.transformer()
    modules = lora_modules(tiny.FAMILY, model, trained, tiny.TARGETS)
    layers = add_many_lora(model, modules, RANK, ALPHA, [0] * runs)
    for number, layer in enumerate(layers):
        generator = torch.Generator().manual_seed(number)
        layer.b.data.normal_(std=0.05, generator=generator)
    begun = [(layer.a.detach().clone(), layer.b.detach().clone()) for layer in layers]
    many = ManySessions(TrainableSubgraph(model, tiny.FAMILY, trained, tiny.GRID), layers, ADAMW)
    together = [many.step(batch, ADAMW.lr) for batch in draws]

    for run in range(runs):
        model = tiny.transformer()
        add_lora(model, modules, RANK, ALPHA, seed=0)
        session = EagerSession(TrainableSubgraph(model, tiny.FAMILY, trained, tiny.GRID), ADAMW)
        for name, tensors in zip(modules, begun, strict=True):
            for part, tensor in zip("AB", tensors, strict=True):
                parameter = session.parameters[lora_name(f"{name}.lora_{part}.default.weight")]
                parameter.data.copy_(tensor[run].reshape(parameter.shape))
        for step, batch in enumerate(draws):
            loss = session.step({name: value.numpy() for name, value in batch[run].items()})
            assert together[step][run] == pytest.approx(loss, rel=1e-5)
        for name, layer in zip(modules, layers, strict=True):
            for part, tensor in zip("AB", (layer.a, layer.b), strict=True):
                wanted = session.parameters[
                    lora_name(f"{name}.lora_{part}.default.weight")
                ].flatten(1)
                off = (tensor[run] - wanted).abs().max().item()
                # a share of a step's 1e-2
                assert off < 1e-4, f"run {run}, {name}.lora_{part}: off by {off:.2g}"


def test_each_run_begins_as_add_lora_does_with_its_seed() -> None:
    model = tiny.transformer()
    before = {name: type(module) for name, module in model.named_modules()}
    modules = lora_modules(tiny.FAMILY, model, [1], tiny.TARGETS)
    layers = add_many_lora(model, modules, RANK, ALPHA, [7, 3])
    for row, seed in enumerate([7, 3]):
        alone = tiny.transformer()
        add_lora(alone, modules, RANK, ALPHA, seed)
        parameters = dict(alone.named_parameters())
        for name, layer in zip(modules, layers, strict=True):
            wanted = parameters[f"{name}.lora_A.default.weight"].flatten(1)
            assert torch.equal(layer.a[row], wanted), name
            assert not layer.b[row].any(), name
    remove_many_lora(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


# ---------------------------------------------------------------- arms


@given(sigma=unit, chance=unit)
def test_crops_stay_between_s_min_and_s_max(sigma: float, chance: float) -> None:
    for name, crop in CROPS.items():
        assert 0 <= crop(sigma, chance) <= 1, name


def test_crops_at_both_ends_of_the_noise() -> None:
    ends = {name: (crop(0.0, 0.3), crop(1.0, 0.3)) for name, crop in CROPS.items()}
    assert ends == {
        "resize": (1, 1),
        "low-to-high": (0, 1),
        "high-to-low": (1, 0),
        "random": (0.3, 0.3),
    }


@given(u=unit, v=unit)
def test_a_window_is_the_same_place_of_states_positions_and_target(u: float, v: float) -> None:
    """Every value says which token it is of; text, of which there are 3 tokens, is kept."""
    image = torch.arange(36.0).reshape(1, 36, 1)
    both = torch.cat([-torch.ones(1, 3, 1), image], 1)
    latents = image.reshape(1, 1, 6, 6).repeat_interleave(2, 2).repeat_interleave(2, 3)
    draw = Draw(0, 0, 0, 0.5, u, v, Crop(0, 0, 8))
    found = [
        cut(
            Through([State(image), State(both)], {"rope_cos": both[0]}, target, None),
            rule.window(draw),
            rule,
        )
        for target in (latents, image)
        for rule in [WindowRule(2, 6)]
    ]
    kept = found[0].states[0].image.flatten().tolist()
    first = int(kept[0])
    assert kept == [first, first + 1, first + 6, first + 7]
    assert first // 6 <= 4
    assert first % 6 <= 4
    for one in found:
        assert one.states[1].image.flatten().tolist() == [-1, -1, -1, *kept]
        assert one.cond["rope_cos"].flatten().tolist() == [-1, -1, -1, *kept]
    assert found[0].target.shape == (1, 1, 4, 4)
    assert found[0].target[0, 0, ::2, ::2].flatten().tolist() == kept
    assert found[1].target.flatten().tolist() == kept


def test_the_margin_is_on_edges_that_are_not_the_pictures() -> None:
    corner, middle = Window(Crop(0, 0, 3), 6), Window(Crop(2, 3, 3), 6)
    assert inside(corner, 1).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert inside(middle, 1).tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert inside(Window(Crop(0, 0, 6), 6), 2).all()


def test_a_windows_margin_does_not_count() -> None:
    latents = torch.zeros(1, 1, 12, 12)
    through = Through([State(torch.zeros(1, 36, 1))], {}, latents, 0.5)
    where = (Draw(0, 0, 0, 0.5, 0.0, 0.0, Crop(0, 0, 8)), WindowRule(2, 6))
    kept, rule = where[1].window(where[0]), where[1]
    weight = cut(through, kept, rule, 1).weight
    assert weight[0, 0].tolist() == [[0.5, 0.5, 0, 0]] * 2 + [[0, 0, 0, 0]] * 2
    assert cut(through, kept, rule).weight == 0.5


@given(seed=st.integers(0, 10_000))
def test_a_spread_patch_has_one_token_of_each_cell(seed: int) -> None:
    rule = WindowRule(3, 6)
    one = Draw(0, seed, 0, 0.5, 0.0, 0.0, Crop(0, 0, 8))
    kept = spread(one, rule)
    rows, columns = kept.numbers // 6, kept.numbers % 6
    assert (rows // 2).tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert (columns // 2).tolist() == [0, 1, 2] * 3
    tokens = torch.arange(36.0).reshape(1, 36, 1)
    rope = torch.arange(40.0).reshape(40, 1)  # four of text
    through = Through([State(tokens)], {"rope_cos": rope, "temb": rope}, tokens, None)
    found = cut(through, kept, rule)
    assert found.states[0].image.flatten().tolist() == kept.numbers.tolist()
    assert found.target.flatten().tolist() == kept.numbers.tolist()
    assert found.cond["rope_cos"].flatten().tolist() == [0, 1, 2, 3, *(4 + kept.numbers)]
    assert torch.equal(found.cond["temb"], rope)


@pytest.mark.parametrize("single", [False, True])
def test_a_token_that_counts_twice_is_two_tokens(single: bool) -> None:
    torch.manual_seed(2)
    kind = FluxSingleTransformerBlock if single else FluxTransformerBlock
    block = kind(16, 2, 8)
    text, image, temb = torch.randn(1, 3, 16), torch.randn(1, 4, 16), torch.randn(1, 16)
    angles = torch.rand(7, 4).repeat_interleave(2, 1)
    twice = torch.cat([angles, angles[3:]])

    def run(image: Tensor, at: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return block(image, text, temb, image_rotary_emb=(at.cos(), at.sin()))

    wanted, plain = run(image.repeat(1, 2, 1), twice), run(image, angles)
    with counting([block], 4, 2.0):
        found = run(image, angles)
    assert torch.allclose(found[0], wanted[0], atol=1e-5)
    assert torch.allclose(found[1], wanted[1][:, :4], atol=1e-5)
    assert (plain[1] - found[1]).abs().max() > 1e-3
    assert torch.equal(run(image, angles)[1], plain[1])


@given(worth=st.lists(st.floats(-1, 1), min_size=1, max_size=12), rank=st.sampled_from([4, 8, 16]))
def test_ranks_by_block_are_as_many_at_most_and_ordered_by_worth(
    worth: list[float], rank: int
) -> None:
    ranks = ranks_by_block(worth, rank)
    assert sum(ranks) <= rank * len(worth)
    assert all(rank // 4 <= one <= 2 * rank for one in ranks)
    if len({*worth}) == 1 and worth[0] > 1e-3:
        assert ranks == [rank] * len(worth)
    pairs = [
        (a, b)
        for a, x in zip(ranks, worth, strict=True)
        for b, y in zip(ranks, worth, strict=True)
        if x > y
    ]
    # but for one that rounding takes from the largest
    assert all(a >= b - 1 for a, b in pairs)


def test_modules_of_other_ranks_begin_as_those_of_one() -> None:
    model = tiny.transformer()
    modules = lora_modules(tiny.FAMILY, model, [1], tiny.TARGETS)
    alone = add_many_lora(model, modules, RANK, ALPHA, [0])
    scale, size = alone[0].scale, float(alone[0].a.detach().std())
    remove_many_lora(model)
    ranks = [2, 8] * (len(modules) // 2) + [4] * (len(modules) % 2)
    layers = add_many_lora(model, modules, RANK, ALPHA, [0], ranks=ranks)
    assert [layer.a.shape[1] for layer in layers] == [layer.b.shape[2] for layer in layers] == ranks
    assert all(layer.scale == scale for layer in layers)
    assert float(layers[1].a.detach().std()) == pytest.approx(size, rel=0.3)


@pytest.mark.parametrize(
    ("arm", "given"),
    [
        ("context-50", {"outside_sums", "outside_edge"}),
        ("ring-50", {"outside_edge"}),
        ("context-cells-50", {"outside_keys", "outside_values", "outside_mask"}),
        ("context-50", {"outside_keys", "outside_values", "outside_mask"}),
    ],
)
def test_an_arm_is_given_what_edge_dit_gives(arm: str, given: set[str]) -> None:
    """But for cells of one token, and attention that is given nothing."""
    torch.manual_seed(3)
    linear = "outside_edge" in given
    family = family_of("sana" if linear else "flux")
    block: Any = (
        SanaTransformerBlock(16, 2, 8, 0.0, 2, 8, 16) if linear else FluxTransformerBlock(16, 2, 8)
    )
    way, own = surroundings_of(family, ARMS[arm]), family.surroundings
    assert own is not None
    window = WindowRule(3, 6).window(Draw(0, 0, 0, 0.5, 0.4, 0.9, Crop(0, 0, 8)))
    if linear:
        text, modulation = torch.randn(2, 4, 16), torch.randn(2, 96)
        cond = {"encoder_hidden_states": text, "timestep": modulation}
        cond["encoder_attention_mask"] = torch.zeros(2, 1, 4)
    else:
        angles = torch.rand(40, 4).repeat_interleave(2, 1)
        cond = {"temb": torch.randn(2, 16), "rope_cos": angles.cos(), "rope_sin": angles.sin()}
    state = State(torch.randn(2, 36, 16), None if linear else torch.randn(2, 4, 16))
    with torch.no_grad(), way.watch(block) as seen:
        family.run_block("b.0", block, state, cond, (6, 6))
    found = around(way, ARMS[arm], block, seen, 1, window)
    wanted = own.around(block, {k: v[1:] for k, v in seen.items()}, window)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        if name not in given:
            assert not value.any(), name
        elif ARMS[arm].cell == (1 if linear else 2):
            torch.testing.assert_close(value.float(), wanted[name], atol=1e-3, rtol=1e-3)
        else:
            assert value.shape[1] == 4 * wanted[name].shape[1], name


def test_positions_of_a_whole_picture_and_of_a_corner() -> None:
    ids = told(Crop(0, 0, 32), (4, 4), 8)
    assert ids[:, 0].tolist() == [0] * 16
    assert ids[:5, 1:].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]]
    # 16 px from (8, 16) on, shown as 4 x 4 tokens: each is half a token of the picture
    corner = told(Crop(8, 16, 16), (4, 4), 8)
    assert corner[:5, 1:].tolist() == [[0.75, x] for x in (1.75, 2.25, 2.75, 3.25)] + [[1.25, 1.75]]


def small_sessions(**options: Any) -> tuple[ManySessions, list[ManyLora]]:
    """Two runs whose B is not zero."""
    model = tiny.transformer()
    modules = lora_modules(tiny.FAMILY, model, (1, 2), tiny.TARGETS)
    layers = add_many_lora(model, modules, RANK, ALPHA, [0, 1])
    for number, layer in enumerate(layers):
        layer.b.data.normal_(std=0.05, generator=torch.Generator().manual_seed(number))
    subgraph = TrainableSubgraph(model, tiny.FAMILY, (1, 2), tiny.GRID)
    return ManySessions(subgraph, layers, ADAMW, **options), layers


def test_a_step_of_several_draws_lowers_their_mean_loss() -> None:
    turns = [[draw(10 * turn + run, (1, 2)) for run in range(2)] for turn in range(3)]
    one, layers = small_sessions()
    alone = [one.losses(draws) for draws in turns]
    wanted = torch.autograd.grad(torch.stack(alone).mean(0).sum(), layers[0].b)[0]
    several, layers = small_sessions()
    losses = several.step_of_several(turns, 0.0)
    assert losses == pytest.approx(torch.stack(alone).mean(0).tolist())
    # clipped to a norm, run by run: directions are the same
    for run in range(2):
        found = layers[0].b.grad[run]
        assert torch.cosine_similarity(found.flatten(), wanted[run].flatten(), 0) > 0.9999


def test_updates_by_rows_are_adamws_times_a_factor_of_the_row() -> None:
    turns = [draw(run, (1, 2)) for run in range(2)]
    (plain, before), (scaled, after) = small_sessions(), small_sessions(by_rows=True)
    begun = [layer.b.detach().clone() for layer in before]
    plain.step(turns, 1e-2)
    scaled.step(turns, 1e-2)
    for was, adamw, rows in zip(begun, before, after, strict=True):
        factor = 1 / (was.norm(dim=2, keepdim=True) + 0.25).sqrt()
        assert torch.allclose(rows.b - was, factor * (adamw.b - was), atol=1e-6)
        assert torch.equal(rows.a, adamw.a)


def test_an_orthogonal_start_keeps_the_rows_lengths() -> None:
    model = tiny.transformer()
    modules = lora_modules(tiny.FAMILY, model, [1], tiny.TARGETS)
    plain = [layer.a for layer in add_many_lora(model, modules, RANK, ALPHA, [0, 1])]
    remove_many_lora(model)
    turned = [layer.a for layer in add_many_lora(model, modules, RANK, ALPHA, [0, 1], True)]
    for a, q in zip(plain, turned, strict=True):
        lengths = a.norm(dim=2)
        assert torch.allclose(q @ q.transpose(1, 2), torch.diag_embed(lengths**2), atol=1e-6)
        assert not torch.allclose(a, q)


@pytest.mark.parametrize("how", STARTS)
def test_an_adapter_that_starts_as_the_error_leaves_less_of_it(how: str) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(24, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    sizes = torch.rand(40, generator=generator) + 0.1
    sizes[:3] = 8.0  # a few loud inputs
    parts = STARTS[how](weight, sizes, 8)
    plain = Parts(in_four_bits(weight), torch.zeros(24, 8), torch.zeros(8, 40))
    assert parts.left.shape == (24, 8)
    assert parts.right.shape == (8, 40)
    assert error(weight, sizes, parts) < 0.5 * error(weight, sizes, plain)


@pytest.mark.parametrize("how", ["gaussian", *STARTS])
def test_four_bits_end_with_the_base_model_and_what_was_learned(how: str) -> None:
    sessions, layers = small_sessions()
    if how in STARTS:
        for layer in layers:
            layer.b.data.zero_()
    turns = [draw(run, (1, 2)) for run in range(2)]
    with torch.no_grad():
        wanted = sessions.losses(turns)
        with measuring(layers) as sizes:
            sessions.losses(turns)
    frozen = frozen_layers(sessions.subgraph.blocks())
    assert [len(size) for size in sizes] == [layer.a.shape[2] for layer in layers]
    before = begin_in_four_bits(layers, frozen, sizes, how)
    with torch.no_grad():
        coarse = sessions.losses(turns)
    assert not torch.equal(coarse, wanted)
    end_in_four_bits(layers, frozen, before)
    with torch.no_grad():
        assert torch.allclose(sessions.losses(turns), wanted, rtol=1e-4)
        if how in STARTS:  # what is learned after the start stays
            layers[0].b.add_(5 * torch.randn(layers[0].b.shape))
            assert not torch.allclose(sessions.losses(turns), wanted, rtol=1e-4)


def test_the_first_ranks_alone_are_an_adapter_of_that_rank() -> None:
    sessions, layers = small_sessions()
    turns = [draw(run, (1, 2)) for run in range(2)]
    for layer in layers:
        layer.used = 1
    losses = sessions.losses(turns)
    losses.sum().backward()
    assert layers[0].b.grad[:, :, 0].any()
    assert not layers[0].b.grad[:, :, 1:].any()
    for layer in layers:
        layer.used = None
        layer.b.data[:, :, 1:] = 0
    with torch.no_grad():
        assert torch.allclose(sessions.losses(turns), losses)


def test_runs_with_other_positions_are_no_batch() -> None:
    rows = [{"rope_cos": torch.full((5, 2), float(k)), "temb": torch.ones(1, 3)} for k in range(2)]
    assert joined(rows[:1] * 2)["temb"].shape == (2, 3)
    with pytest.raises(ValueError, match="positions"):
        joined(rows)


def test_every_arm_has_lora_where_it_says() -> None:
    everything = list(range(12))
    selected = {30: everything[1:9], 40: everything[1:8], 50: everything[1:7]}  # one first block
    drawn = {30: everything[:8], 40: everything[:7], 50: everything[:6]}  # last ones only
    chosen = {"skip": selected, "bare": selected, "drawn": drawn, "drawn-bare": drawn}
    chosen["int8"] = chosen["lean"] = chosen["window"] = selected
    past = {name for name, arm in ARMS.items() if name.endswith("-50") and arm.where == "selected"}
    past -= {f"{kind}-50" for kind in (*chosen, "partial")}
    wanted = {
        "first-50": everything[6:],
        "last-50": everything[:6],
        "middle-50": [0, 1, 2, 9, 10, 11],
        "partial-50": selected[50],
        **{f"ends-{k}": everything[1 : 13 - k] for k in (8, 9, 10)},
        **{f"between-{k}": [1, *everything[3 : 14 - k]] for k in (6, 8, 9, 10)},
        "skip-30-large": selected[30],
        **{
            f"{tail}-{k}": everything[head:end]
            for k, head, end in ((50, 4, 10), (40, 4, 11), (30, 3, 11))
            for tail in TAILS
        },
        **dict.fromkeys(past, selected[50]),
        **{f"{kind}-{k}": blocks for kind, of in chosen.items() for k, blocks in of.items()},
    }

    def select(k: int, where: str) -> Skips:
        if where == "proposed":
            return 1, k - 2, [(2, 3)]
        return (0, k, []) if where == "drawn" else (min(k, 1), max(k - 1, 0), [])

    for name, arm in ARMS.items():
        blocks = lora_blocks(arm, 12, select)
        assert blocks == wanted.get(name, everything), name


def test_without_residuals_a_state_passes_skipped_blocks_as_it_is() -> None:
    states = [State(torch.full((1, 2, 3), float(k)), None) for k in range(6)]
    through = Through(states, {}, torch.zeros(1), None)
    running, inner = [1, 3], residual_names(2)[0]
    with_them, bare = (stored(through, running, residuals) for residuals in (True, False))
    found = {
        name: [float(batch[name].mean()) for batch in (with_them, bare)]
        for name in ("entry", inner, "tail_residual")
    }
    assert found == {"entry": [1, 0], inner: [1, 0], "tail_residual": [1, 0]}


def test_claims_are_about_arms_that_exist() -> None:
    named = {arm for claim in CLAIMS for pair in claim.pairs for arm in pair}
    assert named <= set(ARMS)
    assert set(tables.SHARE_CLAIM[:2]) <= set(ARMS)


# ---------------------------------------------------------------- tables


def results(losses: dict[str, list[float]]) -> tables.Results:
    """Made-up runs, one seed for each subject; similarity and adherence are 1 - loss."""
    settings = {"steps": 5, "blocks": [0, 1, 3], "seed": 0, "images": []}

    def run(arm: str, toy: int, loss: float) -> dict[str, object]:
        about = {"arm": arm, "subject": f"toy{toy}", "seed": 0, "settings": settings}
        quality = {"heldout_loss": loss, "similarity": 1 - loss, "adherence": 1 - loss}
        return {**about, **quality, "train_loss": loss}

    return {
        arm: {(f"toy{toy}", 0): run(arm, toy, loss) for toy, loss in enumerate(values)}
        for arm, values in losses.items()
    }


def test_past_arms_and_what_they_are_compared_with_exist() -> None:
    assert {*tables.PAST, *tables.PAST.values()} <= set(ARMS)


def test_a_win_is_by_loss_and_not_at_the_cost_of_similarity() -> None:
    made = results({"skip-50": [0.5, 0.6, 0.7], "window-50": [0.3, 0.41, 0.5]})
    assert tables.wins(made, "window-50", "skip-50") == "wins"
    assert tables.wins(made, "skip-50", "window-50") == "does not win"
    for run in made["window-50"].values():
        run["similarity"] -= 1.0
    assert tables.wins(made, "window-50", "skip-50") == "does not win"
    noise = results({"skip-50": [0.5, 0.6, 0.7], "window-50": [0.3, 0.9, 0.5]})
    assert tables.wins(noise, "window-50", "skip-50") == "does not win"
    assert tables.wins({}, "window-50", "skip-50") == tables.OPEN
    assert "| `window-50` | `skip-50` |" in tables.past_table(noise)


def test_gain_is_paired_and_positive_when_better() -> None:
    made = results({"full": [0.1, 0.2, 0.6], "resize": [0.2, 0.4, 0.9, 5.0]})
    gain = tables.gain(made, "full", "resize", "heldout_loss")
    assert gain is not None
    assert gain.mean == pytest.approx(0.2)
    assert gain.error == pytest.approx(0.1 / 3**0.5)
    assert gain.count == 3
    similar = tables.gain(made, "full", "resize", "similarity")
    assert similar is not None
    assert similar.mean == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("better", "worse", "margin", "verdict"),
    [
        ([0.1, 0.1, 0.1], [0.2, 0.3, 0.2], 2.0, "holds"),
        ([0.1, 0.1, 0.1], [0.2, 0.3, 0.0], 2.0, "does not hold"),  # better, but who knows
        ([0.2, 0.2, 0.2], [0.1, 0.1, 0.11], 2.0, "does not hold"),
        ([0.2, 0.2, 0.2], [0.1, 0.1, 0.11], 0.0, "does not hold"),
        ([0.1, 0.1, 0.1], [0.2, 0.3, 0.0], 0.0, "holds"),
        ([0.1, 0.2], [0.1, 0.2], 0.0, "holds"),
        ([0.1, 0.2], [0.1, 0.2], 2.0, "does not hold"),
        ([0.1], [0.2], 2.0, "not decided"),
        ([], [0.2], 0.0, "not decided"),
    ],
)
def test_a_claim_is_judged_by_its_margin(
    better: list[float], worse: list[float], margin: float, verdict: str
) -> None:
    made = results({"skip-30": better, "bare-30": worse})
    assert tables.judge(made, Claim("", "", (("skip-30", "bare-30"),), margin)) == verdict


def test_one_pair_that_fails_is_enough() -> None:
    claim = Claim("", "", (("full", "resize"), ("full", "random")), 0.0)
    losses = {"full": [0.2, 0.2], "resize": [0.3, 0.3]}
    assert tables.judge(results({**losses, "random": [0.3, 0.3]}), claim) == "holds"
    assert tables.judge(results(losses), claim) == "not decided"
    assert tables.judge(results({**losses, "random": [0.1, 0.2]}), claim) == "does not hold"


@pytest.mark.parametrize(("loss", "verdict"), [(0.019, "holds"), (0.021, "does not hold")])
def test_share_of_full_loras_improvement(loss: float, verdict: str) -> None:
    made = results({"base": [1.0, 2.0], "full": [0.0, 0.0], "skip-30": [loss, 2 * loss]})
    share = tables.share_of_full(made, "skip-30")
    assert share is not None
    assert share.mean == pytest.approx(1 - loss)
    assert tables.judge_share(made) == verdict


def test_report_leaves_out_what_was_not_run() -> None:
    made = results({"base": [1.0, 2.0], "full": [0.5, 0.75], "skip-30": [0.6, 1.0]})
    text = tables.report(made, "tiny-sana", "")
    assert "| `skip-30` |" in text
    assert "| `bare-30` |" not in text
    assert "Not run: `low-to-high`" in text
    assert "| `skip-30` against `bare-30` |  | missing | missing | missing | 0 | not decided |" in (
        text
    )
    assert "0-1, 3" in text
    assert "80.0 ± 0.0 %" in text


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reproduce") / "tiny-sana"


@pytest.fixture(scope="module")
def runs(work: Path) -> list[Run]:
    """Two arms that are run here."""
    arms = (NO_LORA, "skip-50")
    return all_runs(SAMPLES / "sana.toml", work, toys=1, seeds=1, steps=2, arms=arms)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few pictures, drawn in few steps."""
    monkeypatch.setattr(experiment, "GENERATION_STEPS", 2)
    monkeypatch.setattr(measures, "SCENES", 4)
    measures.unrelated.cache_clear()
    yield
    measures.unrelated.cache_clear()


@pytest.mark.usefixtures("quick")
def test_arms_are_trained_measured_and_not_repeated(work: Path, runs: list[Run]) -> None:
    out = work / "runs"
    assert [perform([run], out) for run in runs] == [[run.name] for run in runs]
    assert [perform([run], out) for run in runs] == [[], []]
    found = tables.collect([*(run.name for run in runs), "full-robot-0"], out)
    assert list(found) == [NO_LORA, "skip-50"]
    base, trained = (arm["robot", 0] for arm in found.values())
    assert trained["heldout_loss"] != base["heldout_loss"]
    assert np.isfinite(trained["train_loss"])

    tables.write_results(found, work, how_selected(runs[0].job))
    assert "measured on toy and owl" in (work / "results.md").read_text()
    written = json.loads((work / "results.json").read_text())
    assert [run["heldout_loss"] for run in written["runs"]] == [
        base["heldout_loss"],
        trained["heldout_loss"],
    ]
    for name in ("losses", "pictures"):
        assert (work / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name

    # its numbers stand for these runs, not for others
    again = work / "again"
    again.mkdir()
    take_known([*runs, replace(runs[1], steps=3)], work / "results.json", again)
    assert [is_done(run, again) for run in runs] == [True, True]
    known = json.loads((again / f"{runs[1].name}.json").read_text())
    assert known["heldout_loss"] == trained["heldout_loss"]
    written["arms"]["skip-50"]["rank"] += 1
    (work / "results.json").write_text(json.dumps(written))
    (again / f"{runs[1].name}.json").unlink()
    take_known(runs, work / "results.json", again)
    assert [is_done(run, again) for run in runs] == [True, False]


def test_tables_of_the_documents_are_what_was_measured() -> None:
    found = pages.everything()
    seen: set[str] = set()
    for page in pages.PAGES:
        written = page.read_text()
        assert pages.rendered(written, found) == written, "run: python samples/reproduce/pages.py"
        seen |= {name for _, name, _, _ in pages.MARKED.findall(written)}
    assert seen == set(pages.TABLES)


@pytest.mark.parametrize("model", ["tiny-sana", "tiny-flux"])
def test_what_a_step_keeps_is_what_the_planner_counts(model: str) -> None:
    file = SAMPLES / "reproduce" / "results" / model / "memory.json"
    found, results = json.loads(file.read_text()), pages.everything()[model]
    settings = next(iter(results["skip-50"].values()))["settings"]
    plan = plan_of(SAMPLES / JOBS[model]).model_copy(update={"s_min": settings["s_min"]})
    _, patch = shapes_of(plan)
    cost, paper = patch.cost(settings["blocks"], settings["rank"]), found["skip-50"]
    assert paper["frozen"] == cost.frozen_bytes
    assert paper["LoRA and gradients"] == cost.lora_bytes
    assert paper["moments"] == cost.optimizer_bytes
    # real modules save a few small tensors more than those on the meta device
    assert paper["activations"] == pytest.approx(cost.activation_bytes, rel=0.01)
    assert found["window-50"] == paper
    four = found["window-four-50"]
    assert four == {**paper, "sum of gradients": cost.lora_bytes // 2}
    best = found["best-50"]
    assert 4 * best["frozen"] < 1.2 * found.get("context-four-fresh-50", four)["frozen"]
    assert sum(best.values()) < sum(paper.values())


def test_everything_is_made_of_scripts_that_exist(tmp_path: Path) -> None:
    planned = [command for together in stages(tmp_path) for command in together.values()]
    scripts = {Path(command[0]).stem for command in planned}
    assert scripts == {"fair", "run", "diagnose", "prior", "masks", "memory"}
    for command in planned:
        assert Path(command[0]).is_file(), command
        subprocess.run([sys.executable, "-m", "py_compile", command[0]], check=True)


def test_runs_with_other_settings_are_not_done(tmp_path: Path, runs: list[Run]) -> None:
    run = runs[1]
    file = tmp_path / f"{run.name}.json"
    assert not is_done(run, tmp_path)
    file.write_text(json.dumps({"settings": settings(run)}))
    assert is_done(run, tmp_path)
    assert not is_done(replace(run, steps=3), tmp_path)
    file.write_text(file.read_text()[:-5])
    assert not is_done(run, tmp_path)
