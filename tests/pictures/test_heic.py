"""Pictures of phones; needs the extra: pip install "edge-dit[heic]"."""

import numpy as np
import pytest
from PIL import Image
from test_formats import OTHER, by_littlecms, scene, tiff, turned

from edge_dit.errors import BadInput
from edge_dit.pictures.dataset import read_folder, survey

pillow_heif = pytest.importorskip("pillow_heif")


def write(path, image=None, **options):
    file = pillow_heif.from_pillow(image or scene())
    file.save(path, quality=-1, chroma=444, **options)


def read(path):
    (picture,) = read_folder(path.parent, "a toy", 48)
    assert picture.load().shape[:2] == picture.size
    return picture.load().astype(int)


@pytest.mark.parametrize("name", ["a.heic", "a.HEIF", "a.hif", "a.jpg"])
def test_a_heic_by_any_name(tmp_path, name):
    write(tmp_path / "x.heic")
    (tmp_path / "x.heic").rename(tmp_path / name)
    assert np.abs(read(tmp_path / name) - np.asarray(scene(), dtype=int)).max() < 12


@pytest.mark.parametrize("value", range(1, 9))
def test_it_is_turned_once(tmp_path, value):
    write(tmp_path / "a.heic", exif=tiff([turned(value)]))
    with (
        Image.open(tmp_path / "a.heic", formats=["HEIF"])
        if registered()
        else opened(tmp_path / "a.heic") as image
    ):
        expected = np.asarray(image.convert("RGB"), dtype=int)
    (picture,) = read_folder(tmp_path, "a toy", min(expected.shape[:2]))
    np.testing.assert_array_equal(picture.load(), expected)
    assert expected.shape[:2] == ((64, 48) if value >= 5 else (48, 64))


def registered() -> bool:
    return "HEIF" in Image.OPEN


def opened(path):
    return pillow_heif.open_heif(path).to_pillow()


def test_pillow_does_not_learn_it(tmp_path):
    write(tmp_path / "a.heic")
    read(tmp_path / "a.heic")
    assert not registered()


def test_its_profile_is_used(tmp_path):
    image = scene()
    image.info["icc_profile"] = OTHER
    write(tmp_path / "a.heic", image)
    plain = np.asarray(opened(tmp_path / "a.heic").convert("RGB"))
    expected = by_littlecms(Image.fromarray(plain), OTHER)
    np.testing.assert_array_equal(read(tmp_path / "a.heic"), expected)


@pytest.mark.parametrize("part", [0.02, 0.5, 0.99])
def test_a_truncated_one(tmp_path, part):
    write(tmp_path / "a.heic")
    data = (tmp_path / "a.heic").read_bytes()
    (tmp_path / "a.heic").write_bytes(data[: int(len(data) * part)])
    with pytest.raises(BadInput, match=r"a\.heic: not a readable image"):
        survey(tmp_path)


def test_zeros_after_the_brand(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    with pytest.raises(BadInput, match=r"a\.heic: not a readable image"):
        survey(tmp_path)
