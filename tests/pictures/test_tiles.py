"""Autoencoders in tiles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_dit.pictures.tiles import tiled

SIDES = st.integers(1, 12)


@given(SIDES, SIDES, st.integers(1, 8), st.sampled_from([1, 2, 4]))
def test_what_looks_at_a_place_alone_is_not_changed(rows, columns, tiles, step):
    image = np.random.default_rng(0).random((1, 2, rows * step, columns * step), np.float32)
    seen = []

    def double(part):
        seen.append(part.shape[2:])
        return [part * 2, -part[:, :1]]

    first, second = tiled(image, double, tiles * step, step, (1, 1))
    np.testing.assert_allclose(first, image * 2, rtol=1e-6)
    np.testing.assert_allclose(second, -image[:, :1], rtol=1e-6)
    assert all(max(shape) <= tiles * step for shape in seen)
    if max(rows, columns) <= tiles:
        assert len(seen) == 1


@pytest.mark.parametrize(("up", "down"), [(1, 4), (4, 1)])
def test_sizes_change_as_the_autoencoder_changes_them(up, down):
    image = np.random.default_rng(0).random((1, 3, 48, 80), np.float32)

    def resize(part):
        if up == 1:
            _, c, h, w = part.shape
            return [part.reshape(1, c, h // 4, 4, w // 4, 4).mean((3, 5))]
        return [part.repeat(4, 2).repeat(4, 3)]

    (whole,), (cut,) = resize(image), tiled(image, resize, 32, 4, (up, down))
    assert whole.shape == cut.shape == (1, 3, 48 * up // down, 80 * up // down)
    np.testing.assert_allclose(cut, whole, rtol=1e-5, atol=1e-6)


def test_tiles_that_differ_meet_without_a_step():
    """Every tile answers with its own number; along the border it changes little by little."""
    image = np.zeros((1, 1, 64, 160), np.float32)
    numbers = iter(range(100))
    (found,) = tiled(image, lambda part: [part + next(numbers)], 64, 8, (1, 1))
    steps = np.abs(np.diff(found[0, 0], axis=1))
    assert found.max() > 1
    assert steps.max() < 0.15
