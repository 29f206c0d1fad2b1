"""Eq. 1 and the antialiased patch, host side."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dit.models.patch_sampler import PatchSampler
from edge_dit.pictures.crop import CropRule
from edge_dit_runtime.probes import sampler_inputs

unit = st.floats(0, 1, width=32)


@given(unit, unit, unit, st.integers(128, 400), st.integers(128, 400))
@settings(max_examples=150, deadline=None)
def test_patch_equals_torch_antialiased_interpolate(sigma, u, v, height, width):
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height))
    crop = CropRule(64, 128, 8).crop(sigma, u, v, height, width)
    cut = image[:, :, crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]
    expected = torch.nn.functional.interpolate(cut, size=64, mode="bilinear", antialias=True)
    found = PatchSampler(CropRule(64, 128, 8))(image, torch.tensor([sigma]), torch.tensor([u, v]))
    assert (found - expected).abs().max() < 1e-5


@given(unit, unit, unit, st.integers(64, 300), st.integers(64, 300), st.sampled_from([8, 16, 32]))
def test_crop_lies_within_the_image(sigma, u, v, height, width, multiple):
    crop = CropRule(32, 64, multiple).crop(sigma, u, v, height, width)
    assert crop.side % multiple == 0
    assert 32 <= crop.side <= 64
    assert 0 <= crop.top <= height - crop.side
    assert 0 <= crop.left <= width - crop.side


@pytest.mark.parametrize(("sigma", "side"), [(0, 512), (0.5, 768), (1, 1024), (0.51, 768)])
def test_eq_1_with_the_papers_sizes(sigma, side):
    assert CropRule(512, 1024, 32).side(sigma) == side


def test_every_position_is_reached():
    lefts = {CropRule(32, 64, 8).crop(1.0, u, 0, 64, 70).left for u in np.linspace(0, 1, 500)}
    assert lefts == set(range(7))


@pytest.mark.parametrize("sizes", [(32, 48, 8), (112, 128, 8), (512, 1024, 32)])
def test_verify_sees_crops_that_grow_a_little_too_fast(sizes):
    """Rounding hides a span of sides that is 5 % too large, but at noise levels below a step."""
    sampler = PatchSampler(CropRule(*sizes))
    seen = 0
    for image, sigma, uv in sampler_inputs(CropRule(*sizes)):
        if image.shape[2] > sizes[1]:
            continue  # one size of images is enough, and 1024 px take their time
        given = [torch.from_numpy(value) for value in (image, sigma, uv)]
        right = sampler(*given)
        wrong = sampler(given[0], 1.05 * given[1], given[2])
        seen += not torch.allclose(right, wrong, atol=1e-5)
    assert seen
