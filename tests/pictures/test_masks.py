"""Loss masks: found beside their pictures, sized and averaged as they are."""

import numpy as np
import pytest
from PIL import Image

from edge_dit.errors import BadInput
from edge_dit.pictures.dataset import SubjectFolder, read_folder, read_folders, survey, with_prior
from edge_dit.pictures.masks import of_tokens


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (40, 32), "red").save(tmp_path / f"{name}.png")
    mask = Image.new("L", (40, 32))
    mask.paste(255, (0, 0, 20, 32))
    mask.save(tmp_path / "a.mask.png")
    return tmp_path


def test_a_mask_is_no_picture_and_belongs_to_its_stem(folder):
    found = survey(folder)
    assert found.listing.pictures == ["a.png", "b.png"]
    assert found.masks == {"a.png": "a.mask.png"}
    assert not found.left_out
    assert any("1 have a mask" in line for line in found.in_words())
    first, second = read_folder(folder, "a toy", 16)
    assert second.mask is None
    assert second.mask_sha256 == ""
    mask = first.mask()
    assert mask.shape == first.pixels.shape[1:]
    assert mask[:, :8].min() > 0.9
    assert mask[:, 12:].max() < 0.1
    assert len(first.mask_sha256) == 64


def test_a_mask_of_no_picture_is_listed(folder):
    (folder / "a.mask.png").rename(folder / "c.mask.png")
    (entry,) = survey(folder).left_out
    assert (entry.name, entry.reason) == ("c.mask.png", "a mask of no picture")


def test_a_mask_of_another_size_is_refused(folder):
    Image.new("L", (32, 40)).save(folder / "a.mask.png")
    with pytest.raises(BadInput, match=r"a mask of 32 x 40 pixels, its picture has 40 x 32"):
        survey(folder)


def test_the_alpha_channel_where_asked_for(folder):
    (folder / "a.mask.png").unlink()
    pixels = np.full((32, 40, 4), 255, np.uint8)
    pixels[:16, :, 3] = 0
    Image.fromarray(pixels).save(folder / "b.png")
    subject = SubjectFolder(folder, "a toy", alpha_masks=True)
    opaque, half = read_folders([subject], 32)
    assert opaque.mask().min() == 1
    assert half.mask()[:16].max() == 0
    assert half.mask()[16:].min() == 1
    assert half.mask_sha256 == "alpha"
    assert all(picture.mask is None for picture in read_folder(folder, "a toy", 32))


def test_a_mask_and_the_alpha_channel_are_two_masks(folder):
    subject = SubjectFolder(folder, "a toy", alpha_masks=True)
    with pytest.raises(BadInput, match="remove one of the two"):
        read_folders([subject], 32)


def test_a_mask_that_changed_since_it_was_listed(folder):
    first, _ = read_folder(folder, "a toy", 16)
    Image.new("L", (40, 32)).save(folder / "a.mask.png")
    with pytest.raises(BadInput, match="changed since it was listed"):
        first.mask()


def test_prior_draws_keep_all_of_the_picture(folder):
    pictures = with_prior(read_folder(folder, "a toy", 16), ["a toy"], 1.0)
    assert [bool(picture.mask) for picture in pictures] == [True, False, False, False]


@pytest.mark.parametrize("target", [(1, 6, 16), (1, 4, 4, 6), (1, 4, 2, 3)])
def test_tokens_have_the_mean_of_their_pixels(target):
    patch = np.random.default_rng(0).random((8, 12)).astype(np.float32)
    found = of_tokens(np.kron(patch, np.ones((2, 2), np.float32)), (2, 3), target)
    tokens = patch.reshape(2, 4, 3, 4).mean((1, 3))
    if len(target) == 3:
        assert found.shape == (1, 6, 1)
        np.testing.assert_allclose(found.ravel(), tokens.ravel(), rtol=1e-6)
    else:
        repeat = target[2] // 2
        wanted = np.kron(tokens, np.ones((repeat, repeat)))[None, None]
        assert found.shape == (1, 1, *target[2:])
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
