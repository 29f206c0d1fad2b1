"""Blocks that are given what is around a window compute in it what they compute in the picture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dit.contract.bank import Crop, Draw
from edge_dit.contract.names import OUTSIDE
from edge_dit.models.families import family_of
from edge_dit.models.families.family import State
from edge_dit.models.families.parts.surroundings import _at_edge, _edge_of, are_given
from edge_dit.pictures.window import Window, WindowRule

WIDTH, TEXT, TOLERANCE = 16, 3, 1e-4
sides = st.integers(1, 7).flatmap(lambda side: st.tuples(st.integers(1, side), st.just(side)))
share = st.floats(0, 1, width=32)


def window_of(sizes: tuple[int, int], u: float, v: float) -> Window:
    return WindowRule(*sizes).window(Draw(0, 0, 0, 0.5, u, v, Crop(0, 0, 8)))


def block_of(kind: str) -> Any:
    torch.manual_seed(3)
    if kind == "sana":
        made: Any = SanaTransformerBlock(
            WIDTH, 2, 8, 0.0, 2, 8, WIDTH, qk_norm="rms_norm_across_heads"
        )
    else:
        made = {"double": FluxTransformerBlock, "single": FluxSingleTransformerBlock}[kind](
            dim=WIDTH, num_attention_heads=2, attention_head_dim=8
        )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.5)
    return made.requires_grad_(False)


BLOCKS = {kind: block_of(kind) for kind in ("sana", "double", "single")}


def picture_of(kind: str, side: int) -> tuple[State, dict[str, torch.Tensor]]:
    """A state of a whole picture, and conditioning."""
    torch.manual_seed(side)
    image = torch.randn(1, side**2, WIDTH)
    if kind == "sana":
        return State(image), {
            "encoder_hidden_states": torch.randn(1, TEXT, WIDTH),
            "encoder_attention_mask": torch.zeros(1, 1, TEXT),
            "timestep": torch.randn(1, 6 * WIDTH),
        }
    angles = torch.randn(TEXT + side**2, 4).repeat_interleave(2, 1)
    cond = {"temb": torch.randn(1, WIDTH), "rope_cos": angles.cos(), "rope_sin": angles.sin()}
    return State(image, torch.randn(1, TEXT, WIDTH)), cond


def both(kind: str, window: Window) -> tuple[State, State, State]:
    """A window after a block that ran on the picture; on the window, given what is around it; and
    on the window alone.
    """
    family, block = family_of("sana" if kind == "sana" else "flux"), BLOCKS[kind]
    state, cond = picture_of(kind, window.side)
    surroundings = family.surroundings
    assert surroundings is not None
    with surroundings.watch(block) as seen:
        whole = family.run_block("b.0", block, state, cond, (window.side,) * 2)
    around = surroundings.around(block, seen, window)
    blank = surroundings.blank(block, window.place.side, window.side)
    assert {k: v.shape for k, v in around.items()} == {k: v.shape for k, v in blank.items()}
    cut = State(window.tokens(state.image), state.text)
    own = {k: window.tokens(v, 0) if k.startswith("rope_") else v for k, v in cond.items()}
    grid = (window.place.side,) * 2
    told = {**own, **{f"{name}.b.0": value for name, value in around.items()}}
    return (
        State(window.tokens(whole.image), whole.text),
        family.run_block("b.0", block, cut, told, grid),
        family.run_block("b.0", block, cut, own, grid),
    )


@given(sides, share, share)
@settings(deadline=None)
def test_linear_attention_and_convolution_lack_nothing(sizes, u, v):
    whole, told, _ = both("sana", window_of(sizes, u, v))
    torch.testing.assert_close(told.image, whole.image, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("kind", ["double", "single"])
@given(sizes=sides, u=share, v=share)
@settings(deadline=None)
def test_softmax_attention_lacks_nothing_where_each_token_is_a_cell(kind, sizes, u, v):
    """So it is where the picture's side is odd; text hears the whole picture too."""
    patch, side = sizes
    window = window_of((patch, side + 1 - side % 2), u, v)
    whole, told, _ = both(kind, window)
    for found, wanted in zip(told, whole, strict=True):
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_window_alone_lacks_something(kind):
    """More than means over cells do."""
    whole, told, alone = both(kind, window_of((4, 8), 0.5, 0.5))
    errors = [float((found.image - whole.image).abs().mean()) for found in (told, alone)]
    assert errors[0] < 0.7 * errors[1]


@given(st.integers(1, 6))
def test_an_edge_is_put_back_where_it_was(side):
    image = torch.randn(2, 3, side, side)
    edge = _edge_of(image)
    found = _at_edge(edge, side)
    assert edge.shape[2] == max(1, 4 * side - 4)
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    wanted = image.clone()
    if side > 2:
        wanted[inside] = 0
    assert torch.equal(found, wanted)


def test_a_block_is_as_it_was_afterwards():
    for kind, block in BLOCKS.items():
        before = dict(block.named_modules())
        _, _, first = both(kind, window_of((2, 4), 0.2, 0.9))
        _, _, again = both(kind, window_of((2, 4), 0.2, 0.9))
        assert torch.equal(first.image, again.image)
        assert dict(block.named_modules()) == before
        assert not any(module._forward_hooks for module in block.modules())


def test_what_is_given_is_known_by_its_name():
    assert are_given({f"{OUTSIDE}sums": torch.zeros(1)})
    assert not are_given({"temb": torch.zeros(1)})
