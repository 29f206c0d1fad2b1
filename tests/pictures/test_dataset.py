"""Pictures are decoded when they are used, kept within bounds, and are those that were listed."""

import numpy as np
import pytest
from PIL import Image

from edge_dit.errors import BadInput, ManyFaults
from edge_dit.pictures import dataset
from edge_dit.pictures.dataset import check_readable, read_folder


@pytest.fixture
def folder(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 96, 128, 3)).astype(np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    return tmp_path


@pytest.fixture
def decoded(monkeypatch):
    """Names of the pictures that were decoded, in order."""
    names, real = [], dataset.read_rgb

    def read_rgb(path, *rest):
        names.append(path.name)
        return real(path, *rest)

    monkeypatch.setattr(dataset, "read_rgb", read_rgb)
    return names


def test_nothing_is_decoded_before_it_is_used(folder, decoded):
    pictures = read_folder(folder, "a toy", 48)
    assert decoded == []
    assert [picture.size for picture in pictures] == [(48, 64)] * 4
    assert pictures[2].pixels.shape == (3, 48, 64)
    assert pictures[2].pixels.dtype == np.float32
    assert decoded == ["2.jpg"]


def test_the_cache_is_bounded(folder, decoded, monkeypatch):
    monkeypatch.setattr(dataset, "CACHE", 2 * 48 * 64 * 3)
    pictures = read_folder(folder, "a toy", 48)
    first = [picture.pixels for picture in pictures]
    again = [picture.pixels for picture in pictures]
    assert decoded == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "2.jpg", "3.jpg"]
    np.testing.assert_array_equal(first, again)


def test_pixels_may_be_written_to(folder):
    (picture, *_) = read_folder(folder, "a toy", 48)
    picture.pixels[:] = 0
    assert picture.pixels.any()


@pytest.mark.parametrize("change", ["edited", "shorter", "another", "gone"])
def test_a_picture_that_changed_since_it_was_listed(folder, change):
    path = folder / "1.jpg"
    pictures = read_folder(folder, "a toy", 48)
    data = path.read_bytes()
    if change == "gone":
        path.unlink()
    elif change == "another":
        Image.new("RGB", (128, 96)).save(path)
    else:
        path.write_bytes(data[:-9] if change == "shorter" else data[:-9] + b"\0" + data[-8:])
    words = "not a readable image" if change == "gone" else "changed since it was listed"
    with pytest.raises(BadInput, match=rf"1\.jpg: {words}"):
        check_readable(pictures)


def test_damage_within_is_found_before_any_work(folder, road, tmp_path_factory, monkeypatch):
    """The ends of both files are right, so that only decoding them tells."""
    from edge_dit.reference import precompute as module

    for name in ("1.png", "3.png"):
        Image.open(folder / name.replace("png", "jpg")).save(folder / name)
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 255
        (folder / name).write_bytes(data)
    pictures = read_folder(folder, "a toy", road.plan.s_max)
    bank = tmp_path_factory.mktemp("work") / "bank"
    monkeypatch.setattr(module, "encoders_of", None)  # nothing is loaded
    with pytest.raises(ManyFaults, match=r"(?s)1\.png: not a readable.*3\.png: not a readable"):
        module.precompute(road.plan, pictures, bank)
    assert not bank.exists()


def test_a_bank_names_pictures_of_sub_folders(folder, road, tmp_path_factory):
    from edge_dit.contract.bank import read_index
    from edge_dit.reference.precompute import precompute

    (folder / "more").mkdir()
    (folder / "0.jpg").rename(folder / "more" / "0.jpg")
    bank = tmp_path_factory.mktemp("work") / "bank"
    plan = road.plan.model_copy(update={"draws": 2})
    precompute(plan, read_folder(folder, "a toy", plan.s_max, recursive=True), bank)
    names = [image.name for image in read_index(bank).images]
    assert names == ["1.jpg", "2.jpg", "3.jpg", "more/0.jpg"]


def test_folders_that_no_plan_has_seen_say_what_is_left_out(folder, capsys):
    from edge_dit.select.subjects import read_subjects

    (folder / "toy").mkdir()
    (folder / "0.jpg").rename(folder / "toy" / "0.jpg")
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        (folder / name).unlink()
    (folder / "toy" / "1.psd").write_text("")
    (subject,) = read_subjects(folder, "a toy", 48)
    assert len(subject.images) == 1
    assert "warning: toy: left out: 1.psd: .psd is no kind" in capsys.readouterr().err


def test_a_file_of_gigabytes_is_not_read(folder):
    with (folder / "4.webp").open("wb") as file:
        file.write(b"RIFF\xff\xff\xff\xffWEBPVP8 ")
        file.truncate(2**31 + 1)  # takes no room
    with pytest.raises(BadInput, match=r"4\.webp: not a readable image \(larger than 2 GiB"):
        read_folder(folder, "a toy", 48)
