"""Read one picture, whatever its format, as upright 8-bit sRGB; or refuse it by name."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from edge_dit.errors import BadInput, missing_extra, require
from edge_dit.pictures.colour import profile_fault, to_srgb
from edge_dit.pictures.folder import FORMATS, HEIF
from edge_dit.store.files import open_regular, write_atomic

MOST_PIXELS = 200_000_000
"""Largest picture read, in pixels: the largest sensor of a phone. A limit of ours, for memory: one
such picture takes about 1.5 GB while it is decoded.
"""
MOST_BYTES = 2 * 2**30
"""Largest file read: some readers of Pillow hold all of it in memory."""
MOST_ASPECT = 8
"""Longest side of a picture, as a multiple of its shorter one. A crop is a square, and the shorter
side becomes s_max: this bounds what a picture takes after it.
"""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Value of `ORIENTATION` -> what turns the picture upright."""
ORIENTATION = 0x0112
"""Tag of EXIF and of TIFF."""
PILLOW = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF")
"""Readers of Pillow that are used: no others, whatever a file claims to be."""
FOREIGN = {
    b"version https://git-lfs": "a pointer of Git LFS, not the picture: git lfs pull",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML file",
    b"8BPS": "a Photoshop file",
    b"%PDF": "a PDF",
    b"\xff\x0a": "a JPEG XL picture",
    b"\0\0\0\x0cJXL ": "a JPEG XL picture",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 picture",
}
"""How files begin that are often named like pictures."""
TAIL = 4096
"""Bytes from the end in which a JPEG must say that it ends."""

_LIMIT = threading.RLock()
WRITTEN = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
"""Endings of pictures that we write -> Pillow's formats."""


@dataclass(frozen=True)
class Header:
    """What a picture is, found without decoding it where its format allows.

    Attributes:
        size: height and width in pixels, upright.
        notes: what is not taken from it: later frames, a colour profile.
    """

    size: tuple[int, int]
    notes: tuple[str, ...]


def read_header(path: Path) -> Header:
    """Look at a picture: is it one, whole, and within the limits?

    PNG, JPEG, WebP, AVIF and HEIC say how long they are. Other formats, and files whose end is not
    where it should be, are decoded to see.

    Raises:
        BadInput: it is not a picture, truncated, or beyond a limit.
    """
    with _opened(path) as (file, image):
        notes = [profile_fault(image), _later_frames(image)]
        if not _is_whole(file, image.format or ""):
            image = _decoded(image)
        width, height = image.size
        size = (width, height) if _orientation(image) >= 5 else (height, width)
    return Header(size, tuple(note for note in notes if note))


def read_rgb(path: Path, sha256: str, resolution: int) -> np.ndarray:
    """Decode a picture and resize its shorter side to ``resolution`` pixels.

    Args:
        path: of the picture.
        sha256: of its bytes when it was listed.
        resolution: pixels.

    Returns:
        [H, W, 3] uint8, upright, sRGB, transparent pixels on white.

    Raises:
        BadInput: unreadable, or no longer the file that was listed.
    """
    with _opened(path, sha256) as (_, image):
        image = _decoded(image)
        turn = TURNS.get(_orientation(image))
        rgb = to_srgb(image)
        if turn is not None:
            rgb = rgb.transpose(turn)
    height, width = resized((rgb.height, rgb.width), resolution)
    if (width, height) != rgb.size:
        rgb = rgb.resize((width, height), Image.Resampling.LANCZOS)
    return np.array(rgb)


def read_mask(path: Path, sha256: str, resolution: int) -> np.ndarray:
    """Decode a loss mask, sized as the picture beside it.

    Args:
        path: of the mask, a picture in shades of gray.
        sha256: of its bytes when it was listed.
        resolution: of the picture, see `read_rgb`.

    Returns:
        [H, W] float32: 0 where it is black, 1 where it is white.

    Raises:
        BadInput: unreadable, or no longer the file that was listed.
    """
    return read_rgb(path, sha256, resolution).mean(-1, dtype=np.float32) / np.float32(255)


def read_alpha(path: Path, sha256: str, resolution: int) -> np.ndarray:
    """The alpha channel of a picture as a loss mask, as `read_mask`; 1 where there is none."""
    with _opened(path, sha256) as (_, image):
        image = _decoded(image)
        turn = TURNS.get(_orientation(image))
        alpha = image.convert("RGBA").getchannel("A")
        if turn is not None:
            alpha = alpha.transpose(turn)
    height, width = resized((alpha.height, alpha.width), resolution)
    if (width, height) != alpha.size:
        alpha = alpha.resize((width, height), Image.Resampling.LANCZOS)
    return np.array(alpha).astype(np.float32) / np.float32(255)


def resized(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """Height and width after the shorter side has become ``resolution`` pixels."""
    short = min(size)
    if short == resolution:
        return size
    height, width = (max(resolution, round(side * resolution / short)) for side in size)
    return height, width


@contextmanager
def _opened(path: Path, sha256: str = "") -> Iterator[tuple[BinaryIO, Image.Image]]:
    """An open file and the picture in it. Whatever a reader raises is the file's fault."""
    try:
        with open_regular(path) as file, _own_limit():
            if os.fstat(file.fileno()).st_size > MOST_BYTES:
                raise ValueError(f"larger than {MOST_BYTES // 2**30} GiB")
            if sha256 and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise BadInput(path, found="changed since it was listed", remedy="start again")
            file.seek(0)
            image = _open(path, file)
            _check_sides(path, image)
            yield file, image
    except BadInput:
        raise
    except Exception as error:  # readers raise struct.error, TypeError, zlib.error and more
        unknown = isinstance(error, UnidentifiedImageError)
        words = "no picture, or pixels of a kind that is not read" if unknown else str(error)
        raise BadInput(
            path,
            found=f"not a readable image ({_foreign(path) or words or type(error).__name__})",
            expected=f"a whole {', '.join(suffix[1:] for suffix in FORMATS)} file",
            remedy="replace it or move it out of the folder",
        ) from None


@contextmanager
def _own_limit() -> Iterator[None]:
    """Pillow's limit of pixels is a global, lower than ours, and calls large pictures an attack:
    off while we read, and as it was afterwards. Its warnings say nothing to a user.
    """
    with _LIMIT, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _open(path: Path, file: BinaryIO) -> Image.Image:
    start = file.read(64)
    file.seek(0)
    if not start:
        raise ValueError("an empty file")
    kind, brands = start[4:8], start[8:64]
    if kind == b"ftyp" and b"avif" not in brands and b"avis" not in brands:
        needs = missing_extra(HEIF, "a HEIC picture")
        try:
            require(HEIF, "a HEIC picture")
        except BadInput:
            found = "a HEIC picture, and pillow-heif is not installed"
            raise BadInput(path, found=found, remedy=needs.remedy) from None
        from pillow_heif.as_plugin import HeifImageFile  # pyright: ignore[reportMissingImports]

        return HeifImageFile(file)  # not registered: Pillow stays as it is for others
    Image.init()
    image = Image.open(file, formats=[name for name in PILLOW if name in Image.OPEN])
    if image.format == "TIFF":  # Pillow would turn it by rewriting all tags, and fails at odd ones
        image.load_end = lambda: None  # type: ignore[method-assign]
    return image


def _check_sides(path: Path, image: Image.Image) -> None:
    width, height = image.size
    long, short = max(width, height), min(width, height)
    if short < 1:
        raise ValueError(f"{width} x {height} pixels")
    if width * height > MOST_PIXELS:
        raise BadInput(
            path,
            found=f"{width} x {height} pixels",
            expected=f"at most {MOST_PIXELS / 1e6:g} megapixels, edge-dit's limit for its memory",
            remedy="scale it down",
        )
    if long > MOST_ASPECT * short:
        raise BadInput(
            path,
            found=f"{width} x {height} pixels, {long / short:.4g} times as long as wide",
            expected=f"at most {MOST_ASPECT} times: patches are squares",
            remedy="crop it",
        )


def _foreign(path: Path) -> str:
    """What a file is by its first bytes, if it is none of our pictures."""
    with suppress(OSError), open_regular(path) as file:
        start = file.read(64).lstrip(b"\xef\xbb\xbf \r\n\t")
        return next((name for head, name in FOREIGN.items() if start.startswith(head)), "")
    return ""


def _decoded(image: Image.Image) -> Image.Image:
    image.load()
    # With its orientation, Pillow gives a TIFF the size that it would have upright.
    return _as_stored(image) if image.format == "TIFF" else image


def _as_stored(image: Any) -> Image.Image:
    plain = image.copy()
    plain.format, plain.tag_v2 = image.format, image.tag_v2
    return plain


def _orientation(image: Any) -> int:
    """The value of tag 0x0112; 1, upright, where it is missing or odd.

    Of EXIF nothing else is read: Pillow's own reader fails at tags that nobody needs. HEIC says it
    elsewhere, and its reader has turned the picture already.
    """
    if image.format == "HEIF":
        return 1
    if image.format == "TIFF":
        value: Any = 1
        with suppress(Exception):  # a tag that cannot be read says nothing
            value = image.tag_v2.get(ORIENTATION, 1)
        return value if isinstance(value, int) and value in TURNS else 1
    exif = image.info.get("exif", b"")
    if not exif and (text := image.info.get("Raw profile type exif")):  # ImageMagick, in PNG
        with suppress(ValueError, TypeError):
            exif = bytes.fromhex("".join(text.split("\n")[3:]))
    return orientation_of(exif) if isinstance(exif, bytes) else 1


def orientation_of(exif: bytes) -> int:
    """Orientation, 1 to 8, in EXIF data: a TIFF header, an offset, and entries of 12 bytes."""
    data = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    try:
        if order is None:
            return 1
        (start,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(order + "HHI", data, entry)
            if tag == ORIENTATION and values == 1 and kind in (1, 3, 4):
                code = {1: "B", 3: "H", 4: "I"}[kind]
                (value,) = struct.unpack_from(order + code, data, entry + 8)
                return value if value in TURNS else 1
    except struct.error:  # it ends early
        pass
    return 1


def _later_frames(image: Any) -> str:
    """A note on the frames of an animation; a phone's MPO holds previews, which nobody misses."""
    if image.format in ("MPO", "HEIF"):
        return ""
    try:
        if not getattr(image, "is_animated", False):
            return ""
        frames = f"{image.n_frames} frames"
    except Exception:  # a later frame that cannot be read
        frames = "several frames"
    image.seek(0)
    return f"{frames}: the first is used"


# ---------------------------------------------------------------- is a file whole?


def _is_whole(file: BinaryIO, kind: str) -> bool:
    """Whether a file's structure says that it ends where it ends; False if that is unknown."""
    end = file.seek(0, os.SEEK_END)
    with suppress(struct.error):
        if kind in ("JPEG", "MPO"):
            file.seek(max(0, end - TAIL))
            return file.read().rstrip(b"\0").endswith(b"\xff\xd9")
        if kind == "PNG":
            return _png_is_whole(file, end)
        if kind == "WEBP":
            file.seek(4)
            return struct.unpack("<I", file.read(4))[0] + 8 <= end
        if kind in ("AVIF", "HEIF"):
            return _boxes_end_at(file, end)
    return False


def _png_is_whole(file: BinaryIO, end: int) -> bool:
    """Whether all chunks are there, and none after the pixels may turn them."""
    place, pixels = 8, False
    while place + 12 <= end:
        file.seek(place)
        length, kind = struct.unpack(">I4s", file.read(8))
        place += 12 + length
        pixels = pixels or kind == b"IDAT"
        if kind == b"IEND":
            return place <= end
        if pixels and kind in (b"eXIf", b"zTXt", b"tEXt", b"iTXt"):
            return False
    return False


def _boxes_end_at(file: BinaryIO, end: int) -> bool:
    """Whether the boxes of an ISO media file fill it."""
    place = 0
    while place < end:
        file.seek(place)
        length, _ = struct.unpack(">I4s", file.read(8))
        if length == 1:
            (length,) = struct.unpack(">Q", file.read(8))
        if length < 8:
            return length == 0
        place += length
    return place == end


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Write a picture as PNG or JPEG, by the file's name; whole, or not at all.

    Args:
        path: ends in .png, .jpg or .jpeg.
        pixels: [H, W, 3] uint8, sRGB.

    Raises:
        BadInput: the name ends in something else, or the file cannot be written.
    """
    check_name(path)
    kind = WRITTEN[path.suffix.lower()]
    content = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    Image.fromarray(pixels).save(content, kind, **options)
    write_atomic(path, content.getvalue())


def check_name(path: Path) -> None:
    """Raise `BadInput` unless `write_picture` can write a file of this name."""
    if path.suffix.lower() not in WRITTEN:
        expected = f"a picture: {' or '.join(WRITTEN)}"
        raise BadInput(path, found=f"a name that ends in {path.suffix!r:.20}", expected=expected)
