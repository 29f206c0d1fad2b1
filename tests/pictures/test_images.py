"""Odd images are handled right or refused by name."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_dit.errors import BadInput, ManyFaults
from edge_dit.pictures.dataset import read_folder, survey
from edge_dit.pictures.images import MOST_ASPECT


def read_image(path, resolution):
    """The one picture of a folder."""
    (picture,) = read_folder(path.parent, "a toy", resolution)
    assert picture.pixels.shape[1:] == picture.size
    return picture.pixels, picture.upscaled


def gradient(width: int = 80, height: int = 64) -> np.ndarray:
    across = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 1))
    down = np.linspace(0, 255, height)[:, None, None] * np.ones((1, width, 1))
    return np.concatenate([across, down, 255 - across], axis=2).round().astype(np.uint8)


def test_rgb_is_kept_as_it_is(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    pixels, upscaled = read_image(tmp_path / "a.png", 64)
    assert pixels.shape == (3, 64, 80)
    assert not upscaled
    np.testing.assert_allclose((pixels + 1) * 127.5, gradient().transpose(2, 0, 1), atol=1e-4)


def test_grayscale_fills_three_channels(tmp_path):
    Image.fromarray(gradient()[:, :, 0]).save(tmp_path / "a.png")
    pixels, _ = read_image(tmp_path / "a.png", 64)
    assert (pixels[0] == pixels[1]).all()
    np.testing.assert_allclose((pixels[0] + 1) * 127.5, gradient()[:, :, 0], atol=1e-4)


def test_sixteen_bit_is_scaled_not_clipped(tmp_path):
    values = gradient()[:, :, 0].astype(np.uint16) * 257
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels, _ = read_image(tmp_path / "a.png", 64)
    np.testing.assert_allclose((pixels[0] + 1) * 127.5, gradient()[:, :, 0], atol=1e-4)


def test_transparency_becomes_white(tmp_path):
    rgba = np.dstack([gradient(), np.full((64, 80), 255, np.uint8)])
    rgba[:, :40, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    pixels, _ = read_image(tmp_path / "a.png", 64)
    assert (pixels[:, :, :40] == 1).all()
    np.testing.assert_allclose(
        (pixels[:, :, 40:] + 1) * 127.5, gradient()[:, 40:].transpose(2, 0, 1), atol=1e-4
    )


def test_palette_with_transparency(tmp_path):
    image = Image.fromarray(gradient()).quantize(16)
    image.info["transparency"] = 0
    image.save(tmp_path / "a.png", transparency=0)
    pixels, _ = read_image(tmp_path / "a.png", 64)
    first = np.asarray(image) == 0
    assert first.any()
    assert (pixels[:, first] == 1).all()


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.fromarray(gradient(64, 96)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    pixels, _ = read_image(tmp_path / "a.jpg", 64)
    assert pixels.shape == (3, 64, 96)


def test_shorter_side_becomes_the_resolution(tmp_path):
    Image.fromarray(gradient(300, 200)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 100)[0].shape == (3, 100, 150)
    pixels, upscaled = read_image(tmp_path / "a.png", 400)
    assert pixels.shape == (3, 400, 600)
    assert upscaled


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_unreadable_and_truncated_are_named_together(tmp_path, content):
    Image.fromarray(gradient()).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for name in ("bad1.png", "bad2.png"):
        (tmp_path / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ManyFaults, match=r"(?s)bad1.*bad2"):
        read_folder(tmp_path, "a toy", 64)


def test_empty_and_missing_folder(tmp_path):
    with pytest.raises(BadInput, match="no image in it"):
        survey(tmp_path)
    with pytest.raises(BadInput, match="no such folder"):
        survey(tmp_path / "nowhere")


def test_captions_side_car_then_prompt_then_fault(tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(gradient()).save(tmp_path / name)
    (tmp_path / "a.txt").write_text(" a red toy\n")
    assert survey(tmp_path).prompts("a toy") == ["a red toy", "a toy"]
    with pytest.raises(BadInput, match=r"b\.png: no caption"):
        survey(tmp_path).prompts(None)
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(BadInput, match="empty caption"):
        survey(tmp_path).prompts("a toy")


@given(
    width=st.integers(1, 60),
    height=st.integers(1, 60),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]),
)
@settings(max_examples=60, deadline=None)
def test_every_mode_and_size_gives_rgb(tmp_path_factory, width, height, mode):
    assume(max(width, height) <= MOST_ASPECT * min(width, height))
    path = tmp_path_factory.mktemp("image") / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (width, height)).save(path)
    pixels, _ = read_image(path, 32)
    assert pixels.shape[0] == 3
    assert min(pixels.shape[1:]) == 32
    assert pixels.dtype == np.float32
    assert np.abs(pixels).max() <= 1
