"""Pictures of every format come out upright, in sRGB, by their declared range; or are refused."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from edge_dit.errors import BadInput
from edge_dit.pictures.colour import profile_fault
from edge_dit.pictures.dataset import Captioned, read_folder, survey
from edge_dit.pictures.images import MOST_PIXELS, TURNS, orientation_of, read_header


def scene() -> Image.Image:
    """64 x 48: four corners of four colours, so that every turn shows."""
    image = Image.new("RGB", (64, 48), "gray")
    for box, colour in (
        ((0, 0, 32, 24), "red"),
        ((32, 0, 64, 24), "lime"),
        ((0, 24, 32, 48), "blue"),
    ):
        image.paste(colour, box)
    return image


def read(path) -> np.ndarray:
    """Levels [H, W, 3] of the one picture in a folder."""
    return one(path).load().astype(int)


def one(path) -> Captioned:
    (picture,) = read_folder(path.parent, "a toy", 48)
    return picture


def notes(path) -> list[str]:
    return [note.reason for note in survey(path.parent).notes]


# ---------------------------------------------------------------- upright


def tiff(tags, order="<") -> bytes:
    """EXIF data of one directory. Tags are number, type, count and packed value."""
    start, data = 8 + 2 + 12 * len(tags) + 4, b""
    body = struct.pack(order + "H", len(tags))
    for tag, kind, count, value in tags:
        body += struct.pack(order + "HHI", tag, kind, count)
        if len(value) <= 4:
            body += value.ljust(4, b"\0")
        else:
            body += struct.pack(order + "I", start + len(data))
            data += value
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return b"Exif\0\0" + head + body + bytes(4) + data


def turned(value, order="<"):
    return (0x0112, 3, 1, struct.pack(order + "H", value))


ODD = {
    "resolution as text": [(0x011A, 2, 3, b"72\0")],
    "a negative size": [(0x0103, 8, 1, struct.pack("<h", -1))],
    "a rational over zero": [(0x011A, 5, 1, struct.pack("<II", 72, 0))],
    "an unknown type": [(0x0131, 99, 4, b"abcd")],
    "a value beyond the end": [(0x010F, 2, 2**31, b"\xff\xff\xff\x7f")],
    "a maker's note": [(0x927C, 7, 3, b"\0\1\2")],
    "a directory that is itself": [(0x8769, 4, 1, struct.pack("<I", 8))],
    "text that is no text": [(0x010E, 2, 8, b"\xff\xfe\xfd\xfc\xfb\xfa\xf9\0")],
    "a double in a short's place": [(0x0128, 12, 1, struct.pack("<d", float("nan")))],
}


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.avif"])
def test_every_orientation_in_every_format(tmp_path, name, value):
    exif = Image.Exif()
    exif[0x0112] = value
    scene().save(tmp_path / name, exif=exif, quality=95)
    with Image.open(tmp_path / name) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=int)
    assert one(tmp_path / name).size == expected.shape[:2] or min(expected.shape[:2]) != 48
    (picture,) = read_folder(tmp_path, "a toy", min(expected.shape[:2]))
    assert picture.size == expected.shape[:2]
    np.testing.assert_array_equal(picture.load(), expected)
    assert expected.shape[:2] == ((64, 48) if value >= 5 else (48, 64))


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_a_tag_that_is_odd_is_nobodys_business(tmp_path, name, odd):
    scene().save(tmp_path / name, exif=tiff([*ODD[odd], turned(6)]), quality=95)
    levels = read(tmp_path / name)
    assert levels.shape == (64, 48, 3)
    assert np.abs(levels[5, 5] - (0, 0, 255)).max() < 40  # the lower left corner is the upper left


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_an_odd_tag_in_a_tiff(tmp_path, compression):
    info = {0x0112: 6, 0x011A: 72.0}
    scene().save(tmp_path / "a.tif", tiffinfo=info, compression=compression)
    data = (tmp_path / "a.tif").read_bytes()
    # XResolution becomes text: what Pillow's own turning fails to write again
    at = data.index(struct.pack("<HHI", 0x011A, 5, 1))
    (tmp_path / "a.tif").write_bytes(data[: at + 2] + struct.pack("<H", 8) + data[at + 4 :])
    assert read(tmp_path / "a.tif").shape == (64, 48, 3)


@pytest.mark.parametrize("value", [0, 9, 255, 65535])
def test_an_orientation_that_is_none(tmp_path, value):
    scene().save(tmp_path / "a.jpg", exif=tiff([turned(value)]))
    assert read(tmp_path / "a.jpg").shape == (48, 64, 3)


def test_a_png_that_is_turned_after_its_pixels(tmp_path):
    scene().save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    chunk = b"eXIf" + tiff([turned(6)]).removeprefix(b"Exif\0\0")
    late = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(data[:-12] + late + data[-12:])
    assert read(tmp_path / "a.png").shape == (64, 48, 3)


def test_a_png_that_imagemagick_turned(tmp_path):
    data = tiff([turned(6)])
    text = f"\nexif\n{len(data):8}\n{data.hex()}\n"
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", text, zip=True)
    scene().save(tmp_path / "a.png", pnginfo=info)
    assert read(tmp_path / "a.png").shape == (64, 48, 3)


def test_xmp_does_not_turn(tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    scene().save(tmp_path / "a.jpg", xmp=xmp)
    assert read(tmp_path / "a.jpg").shape == (48, 64, 3)


@given(data=st.binary(max_size=60), order=st.sampled_from("<>"), value=st.integers(0, 9))
def test_any_exif_gives_an_orientation(data, order, value):
    assert orientation_of(data) in range(1, 9)
    assert orientation_of(b"II*\0" + data) in range(1, 9)
    assert orientation_of(tiff([turned(value, order)], order) + data) == (
        value if value in TURNS else 1
    )


# ---------------------------------------------------------------- colour


def matrix_profile(red_y: float) -> bytes:
    """A profile of linear light with other primaries, made from sRGB's by moving its red."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack_from(">I", profile, 128)[0]
    for entry in range(count):
        name, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * entry)
        if name == b"rXYZ":
            x, y, z = struct.unpack_from(">iii", profile, offset + 8)
            struct.pack_into(">iii", profile, offset + 8, int(x * red_y), int(y * red_y), z)
    return bytes(profile)


OTHER = matrix_profile(0.7)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def by_littlecms(image: Image.Image, profile: bytes) -> np.ndarray:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    made = ImageCms.profileToProfile(
        image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    return np.asarray(made, dtype=int)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.avif"])
def test_colours_are_converted_by_their_profile(tmp_path, name):
    scene().save(tmp_path / name, icc_profile=OTHER, quality=95)
    with Image.open(tmp_path / name) as image:
        plain = np.asarray(image.convert("RGB"), dtype=int)
        expected = by_littlecms(image.convert("RGB"), OTHER)
    assert np.abs(expected - plain).max() > 20
    np.testing.assert_array_equal(read(tmp_path / name), expected)
    assert notes(tmp_path / name) == []


def test_srgb_stays_as_it_is(tmp_path):
    scene().save(tmp_path / "a.png", icc_profile=SRGB)
    np.testing.assert_array_equal(read(tmp_path / "a.png"), np.asarray(scene()))


def test_a_profile_under_transparency_and_in_a_palette(tmp_path):
    image = scene().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 255))
    image.paste((9, 9, 9, 0), (0, 0, 32, 24))
    image.save(tmp_path / "a.png", icc_profile=OTHER)
    expected = by_littlecms(image.convert("RGB"), OTHER)
    expected[:24, :32] = 255
    np.testing.assert_array_equal(read(tmp_path / "a.png"), expected)
    palette = scene().quantize(8)
    palette.save(tmp_path / "a.png", icc_profile=OTHER)
    expected = by_littlecms(palette.convert("RGB"), OTHER)
    np.testing.assert_array_equal(read(tmp_path / "a.png"), expected)


def test_gray_with_a_profile_for_rgb(tmp_path):
    gray = scene().convert("L")
    gray.save(tmp_path / "a.png", icc_profile=OTHER)
    expected = by_littlecms(gray.convert("RGB"), OTHER)
    np.testing.assert_array_equal(read(tmp_path / "a.png"), expected)


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", b"not a profile"),
        ("RGB", SRGB[:200]),
        ("RGB", bytes(128)),
        ("CMYK", SRGB),
        ("RGB", SRGB.replace(b"RGB XYZ ", b"CMYKXYZ ", 1)),
        ("RGB", SRGB.replace(b"RGB XYZ ", b"GRAYXYZ ", 1)),
    ],
)
def test_a_profile_that_does_not_fit_is_said_and_left(tmp_path, mode, profile):
    image = scene().convert(mode)
    image.save(tmp_path / "a.tif", icc_profile=profile)
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), np.asarray(image.convert("RGB")))
    (note,) = notes(tmp_path / "a.tif")
    assert note.startswith("its colour profile is not used (")


@given(data=st.binary(max_size=40), at=st.integers(0, len(SRGB) - 1))
@settings(max_examples=100, deadline=None)
def test_any_profile_is_used_or_said(data, at):
    image = scene()
    image.info["icc_profile"] = SRGB[:at] + data + SRGB[at + len(data) :]
    assert isinstance(profile_fault(image), str)


def test_cmyk_without_a_profile(tmp_path):
    cmyk = scene().convert("CMYK")
    cmyk.save(tmp_path / "a.jpg", quality=95)
    difference = np.abs(read(tmp_path / "a.jpg") - np.asarray(scene(), dtype=int))
    assert difference[5:20, 5:25].max() < 12


def test_lab(tmp_path):
    muted = Image.blend(scene(), Image.new("RGB", (64, 48), "gray"), 0.5)
    lab = ImageCms.profileToProfile(
        muted, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    lab.save(tmp_path / "a.tif")
    assert np.abs(read(tmp_path / "a.tif") - np.asarray(muted, dtype=int)).max() < 8


# ---------------------------------------------------------------- depth

RAMP = np.linspace(0, 1, 64)[None].repeat(48, axis=0)
GRAY = np.round(RAMP * 255).astype(int)


def write_tiff(path, values, declared=None, **options):
    kind = {"f": 11, "u": 4, "i": 9}[values.dtype.kind]
    tags = [(340 + n, kind, 1, v, True) for n, v in enumerate(declared or ())]
    options["photometric"] = "minisblack" if values.ndim == 2 else "rgb"
    tifffile.imwrite(path, values, extratags=tags, metadata=None, **options)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("values", "declared"),
    [
        ((RAMP * 65535).astype("u2"), None),
        ((RAMP * 4095).astype("u2"), (0, 4095)),
        ((RAMP * 1000).astype("u4"), (0, 1000)),
        ((RAMP * (2**32 - 1)).astype("u4"), (0, 2**32 - 1)),
        ((RAMP * 2000 - 1000).astype("i2"), (-1000, 1000)),
        ((RAMP * 2000 - 1000).astype("i4"), (-1000, 1000)),
        (RAMP.astype("f4"), None),
        ((RAMP * 3 - 1).astype("f4"), (-1.0, 2.0)),
    ],
)
def test_values_are_scaled_by_their_range(tmp_path, values, declared, order):
    write_tiff(tmp_path / "a.tif", values, declared, byteorder=order)
    if values.dtype == "u4" and order == ">":  # Pillow reads them in little-endian files alone
        with pytest.raises(BadInput, match="pixels of a kind that is not read"):
            survey(tmp_path)
        return
    levels = read(tmp_path / "a.tif")
    assert np.abs(levels - GRAY[:, :, None]).max() <= 1
    assert np.abs(levels[:, [0, -1]] - GRAY[:, [0, -1], None]).max() == 0


@pytest.mark.parametrize(
    ("values", "declared", "words"),
    [
        ((RAMP * 1000).astype("u4"), None, "32-bit values, whose range it does not say"),
        ((RAMP * 1000).astype("i2"), None, "range it does not say"),
        ((RAMP * 255).astype("f4"), None, "values from 0 to 255, beyond its range of 0 to 1"),
        ((RAMP - 0.5).astype("f4"), None, "beyond its range"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype("f4"), None, "not finite"),
        (np.where(RAMP > 0.5, np.inf, RAMP).astype("f4"), None, "not finite"),
        (RAMP.astype("f4"), (1.0, 1.0), "a range of values from 1 to 1"),
        ((RAMP * 9).astype("f4"), (0.0, 1.0), "beyond its range"),
        (RAMP.astype("f8"), None, "pixels of a kind that is not read"),
        (np.dstack([RAMP] * 3).astype("f4"), None, "not a readable image"),
    ],
)
def test_values_without_a_range_are_refused_by_name(tmp_path, values, declared, words):
    write_tiff(tmp_path / "a.tif", values, declared)
    with pytest.raises(BadInput, match=rf"a\.tif: .*{words}"):
        read(tmp_path / "a.tif")


def test_white_is_zero(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif", (65535 - RAMP * 65535).astype("u2"), photometric="miniswhite"
    )
    assert np.abs(read(tmp_path / "a.tif") - GRAY[:, :, None]).max() <= 1


def test_sixteen_bit_png_with_a_transparent_value(tmp_path):
    values = (RAMP * 65535).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png", transparency=int(values[0, 3]))
    levels = read(tmp_path / "a.png")
    assert (levels[:, 3] == 255).all()
    assert np.abs(levels[:, 4:] - GRAY[:, 4:, None]).max() <= 1


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "1", "LA", "YCbCr"])
def test_modes_that_few_files_have(mode):
    from edge_dit.pictures.colour import to_srgb

    source = {"La": "LA", "RGBa": "RGBA"}.get(mode, "RGB" if mode == "PA" else mode)
    made = scene().convert(source)
    made = made.quantize(8).convert("PA") if mode == "PA" else made.convert(mode)
    assert to_srgb(made).mode == "RGB"


# ---------------------------------------------------------------- frames and limits


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.avif", "a.png", "a.tif"])
def test_the_first_frame_of_an_animation_and_a_note(tmp_path, name):
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100)
    assert np.abs(read(tmp_path / name)[9, 9] - (255, 0, 0)).max() < 10
    assert notes(tmp_path / name) == ["3 frames: the first is used"]


def test_a_phones_previews_are_no_animation(tmp_path):
    other = Image.new("RGB", (32, 24), "blue")
    scene().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[other], quality=95)
    assert np.abs(read(tmp_path / "a.jpg")[9, 9] - (255, 0, 0)).max() < 10
    assert notes(tmp_path / "a.jpg") == []


def giant(path, width, height):
    """A PNG whose header alone is large."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


def test_the_limit_of_pixels_is_ours(tmp_path):
    giant(tmp_path / "a.png", 20000, 10001)
    with pytest.raises(BadInput) as caught:
        survey(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'a.png'}: 20000 x 10001 pixels\n"
        "  expected: at most 200 megapixels, edge-dit's limit for its memory\n"
        "  remedy: scale it down"
    )
    assert MOST_PIXELS > Image.MAX_IMAGE_PIXELS
    giant(tmp_path / "a.png", 20000, 10000)  # Pillow alone would call it an attack
    assert read_header(tmp_path / "a.png").size == (10000, 20000)


def test_pillow_is_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    scene().save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").shape == (48, 64, 3)
    assert Image.MAX_IMAGE_PIXELS == 1000
    (tmp_path / "a.png").write_bytes(b"no")
    with pytest.raises(BadInput):
        survey(tmp_path)
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize(("width", "height"), [(2, 20000), (20000, 2), (1, 9), (801, 100)])
def test_strips_are_refused(tmp_path, width, height):
    Image.new("RGB", (width, height)).save(tmp_path / "divider.png")
    with pytest.raises(BadInput, match=r"(?s)divider\.png: .*at most 8 times.*crop it"):
        survey(tmp_path)
    Image.new("RGB", (800, 100)).save(tmp_path / "divider.png")
    assert survey(tmp_path)


def test_a_single_pixel(tmp_path):
    Image.new("RGB", (1, 1), "teal").save(tmp_path / "a.png")
    assert one(tmp_path / "a.png").upscaled
    assert (read(tmp_path / "a.png") == (0, 128, 128)).all()


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tif", "a.avif"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_a_truncated_file_is_found_before_it_is_drawn(tmp_path, name, part):
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * part)])
    with pytest.raises(BadInput, match=f"{name}: not a readable image"):
        survey(tmp_path)


def test_a_jpeg_with_something_after_its_end_is_decoded_to_see(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data + b"a film of a phone" * 999)
    assert one(tmp_path / "a.jpg").load().shape == (48, 64, 3)
    (tmp_path / "a.jpg").write_bytes(data[:3000] + b"a film of a phone" * 999)
    read_header(tmp_path / "a.jpg")  # Pillow decodes it to gray: nothing can tell


def test_a_file_that_is_something_else_says_what(tmp_path):
    for data, words in (
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"8BPS\0\1" + bytes(40), "a Photoshop file"),
        (b"", "an empty file"),
    ):
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(BadInput, match=rf"a\.png: not a readable image \(.*{words}"):
            survey(tmp_path)


def test_postscript_is_not_run(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(BadInput, match="not a readable image"):
        survey(tmp_path)


def test_a_picture_of_another_ending_is_read_by_its_content(tmp_path):
    scene().save(tmp_path / "a.jpg", "PNG")
    np.testing.assert_array_equal(read(tmp_path / "a.jpg"), np.asarray(scene()))


@pytest.mark.parametrize(
    "error", [struct.error, TypeError, AttributeError, IndexError, OverflowError, zlib.error,
              MemoryError, AssertionError, KeyError, RecursionError, EOFError, SyntaxError]
)  # fmt: skip
@pytest.mark.parametrize("at", ["open", "load"])
def test_whatever_a_reader_raises_names_the_file(tmp_path, monkeypatch, error, at):
    def fail(*_, **__):
        raise error("boom")

    scene().save(tmp_path / "a.gif")
    if at == "open":
        monkeypatch.setattr(Image, "open", fail)
    else:
        monkeypatch.setattr("PIL.GifImagePlugin.GifImageFile.load_prepare", fail)
    with pytest.raises(BadInput, match=r"a\.gif: not a readable image \('?boom"):
        survey(tmp_path)


def bytes_of(kind) -> bytes:
    file = io.BytesIO()
    options = {} if kind == "BMP" else {"exif": tiff([turned(6)])}
    scene().resize((8, 8)).save(file, kind, **options)
    return file.getvalue()


WHOLE = {kind: bytes_of(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")}


@pytest.mark.parametrize("kind", [*WHOLE, "any"])
@given(data=st.binary(max_size=40), at=st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_a_picture_or_a_message(tmp_path_factory, kind, data, at):
    whole = WHOLE.get(kind, b"")
    place = int(at * len(whole))
    path = tmp_path_factory.mktemp("any") / "a.png"
    path.write_bytes(whole[:place] + data + whole[place + len(data) :])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            levels = one(path).load()
        except BadInput:
            return
    assert levels.dtype == np.uint8
    assert min(levels.shape[:2]) == 48
