"""Windows: the tokens of a square of a picture, wherever a tensor has them."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_dit.contract.bank import Crop, Draw
from edge_dit.pictures.sizes import PatchSizes
from edge_dit.pictures.window import WindowRule

share = st.floats(0, 1, width=32)
sides = st.integers(1, 6).flatmap(lambda patch: st.tuples(st.just(patch), st.integers(patch, 9)))


def draw_at(u: float, v: float) -> Draw:
    return Draw(0, 0, 0, 0.5, u, v, Crop(0, 0, 8))


@given(sides, share, share, st.integers(0, 3))
def test_a_window_has_the_tokens_of_a_square(sizes, u, v, text):
    """Each value is the number of its token; text's are negative."""
    patch, side = sizes
    window = WindowRule(patch, side).window(draw_at(u, v))
    top, left = window.place.top, window.place.left
    assert 0 <= top <= side - patch
    assert 0 <= left <= side - patch
    square = np.arange(side**2, dtype=np.float32).reshape(side, side)
    wanted = square[top : top + patch, left : left + patch]
    tokens = np.concatenate([-np.arange(1, text + 1, dtype=np.float32), square.ravel()])
    found = window.tokens(tokens[None, :, None])
    assert found[0, :text, 0].tolist() == tokens[:text].tolist()
    assert found[0, text:, 0].tolist() == wanted.ravel().tolist()
    assert window.tokens(torch.from_numpy(tokens)[:, None], 0)[:, 0].tolist() == [
        *tokens[:text],
        *wanted.ravel(),
    ]
    latents = square[None, None].repeat(2, 2).repeat(2, 3)
    assert window.latents(latents)[0, 0, ::2, ::2].tolist() == wanted.tolist()


@given(sides)
def test_the_ends_of_u_and_v_are_the_pictures_edges(sizes):
    patch, side = sizes
    rule = WindowRule(patch, side)
    assert rule.window(draw_at(0, 0)).place == Crop(0, 0, patch)
    assert rule.window(draw_at(1, 1)).place == Crop(side - patch, side - patch, patch)


@given(sides, share, share)
def test_of_a_batch_what_has_image_tokens_is_cut(sizes, u, v):
    patch, side = sizes
    window = WindowRule(patch, side).window(draw_at(u, v))
    rng = np.random.default_rng(0)

    def values(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    image, text = values(1, side**2, 3), values(1, 4, 3)
    rope = values(4 + side**2, 2)
    batch = {
        "entry": image,
        "entry_text": text,
        "residual.1": image,
        "residual_text.1": text,
        "tail_residual": image,
        "target": values(1, 2, 2 * side, 2 * side),
        "weight_mask": values(1, 1, 2 * side, 2 * side),
        "weight": values(1),
        "cond.temb": values(1, 3),
        "cond.rope_cos": rope,
    }
    found = window.cut(batch, ["rope_cos"])
    assert found.keys() == batch.keys()
    for name in ("entry_text", "residual_text.1", "weight", "cond.temb"):
        np.testing.assert_array_equal(found[name], batch[name])
    for name in ("entry", "residual.1", "tail_residual"):
        np.testing.assert_array_equal(found[name], window.tokens(image))
    assert found["target"].shape == (1, 2, 2 * patch, 2 * patch)
    assert found["weight_mask"].shape == (1, 1, 2 * patch, 2 * patch)
    assert found["cond.rope_cos"].shape == (4 + patch**2, 2)
    assert all(value.flags.c_contiguous for value in found.values())
    packed = window.cut({"target": image, "weight_mask": image[..., :1]}, [])
    assert packed["target"].shape == (1, patch**2, 3)
    assert packed["weight_mask"].shape == (1, patch**2, 1)


def test_sizes_of_windows_and_of_crops():
    crops = PatchSizes(s_min=32, s_max=64, multiple=8)
    windows = crops.model_copy(update={"window": True})
    assert (crops.passing, windows.passing) == (32, 64)
    assert (crops.passing_factor, windows.passing_factor) == (1, 4)
    assert crops.grid == windows.grid == (4, 4)
    assert windows.passing_grid == (8, 8)
    assert crops.window_rule is None
    assert windows.window_rule == WindowRule(4, 8)
    assert windows.crop_rule.side(0.0) == windows.crop_rule.side(1.0) == 64
    assert crops.crop_rule.side(0.0) == 32
