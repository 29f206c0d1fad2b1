"""A decoded picture -> 8-bit sRGB: depth, transparency, colour profile."""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms

TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_FORMAT = 258, 262, 339
TIFF_LEAST, TIFF_MOST = 340, 341
"""Tags: SMinSampleValue and SMaxSampleValue, the range of values from black to white."""
ROWS = 256
"""Rows that are scaled at once."""
SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space of a profile -> mode of the pixels that it is for."""
SAME = 1
"""Levels by which a profile may differ from sRGB and count as sRGB: pixels then stay the same."""


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB.

    Values of more than 8 bits are scaled by their declared range, colours are converted from the
    picture's profile, and transparent pixels are put on white.

    Raises:
        ValueError: values without a declared range, beyond it, or not finite.
    """
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = _scaled(image)
    if image.mode == "LAB":
        return _from_lab(image)
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    alpha = None
    if "A" in image.getbands() or "transparency" in image.info:
        image = image if image.mode == "LA" else image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("L" if image.mode == "LA" else "RGB")
    rgb = _by_profile(image, profile)
    if alpha is None:
        return rgb
    rgb.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")


# ---------------------------------------------------------------- profiles


def profile_fault(image: Image.Image) -> str:
    """Why a picture's colour profile is not used; empty if it is, or if there is none."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode == "LAB":
        return ""
    try:
        _conversion(profile, image.mode == "CMYK", image.mode in ("L", "LA", "1", "I", "I;16"))
    except Exception as error:  # littlecms and its binding raise whatever they like
        words = str(error) or type(error).__name__
        return f"its colour profile is not used ({words}): taken as sRGB"
    return ""


def _by_profile(image: Image.Image, profile: object) -> Image.Image:
    """RGB of an image in mode L, RGB, CMYK, P, 1 or YCbCr.

    A profile that cannot be used is left; `profile_fault` has said so.
    """
    if not isinstance(profile, bytes) or not profile:
        return image.convert("RGB")
    try:
        mode, transform = _conversion(profile, image.mode == "CMYK", image.mode in ("L", "1"))
    except Exception:  # as in `profile_fault`
        return image.convert("RGB")
    image = image.convert(mode)
    if transform is None:
        return image
    return ImageCms.applyTransform(image, transform) or image


@functools.lru_cache(maxsize=8)
def _conversion(
    profile: bytes, is_cmyk: bool, is_gray: bool
) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Mode of the pixels that a profile takes, and the conversion to sRGB; None if it is sRGB.

    Args:
        profile: ICC data.
        is_cmyk: whether the pixels are CMYK.
        is_gray: whether they are gray; a profile for RGB is right for them too.

    Raises:
        ValueError: the profile is not for such pixels.
        Exception: whatever littlecms has against it.
    """
    source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    mode = SPACES.get(space)
    if mode is None or is_cmyk != (mode == "CMYK") or (mode == "L" and not is_gray):
        raise ValueError(f"it is for {space} pixels")
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "RGB":
        probe = _probe()
        changed = np.asarray(ImageCms.applyTransform(probe, transform), dtype=int)
        if np.abs(changed - np.asarray(probe, dtype=int)).max() <= SAME:
            return mode, None
    return mode, transform


@functools.cache
def _probe() -> Image.Image:
    """Colours all over the cube, as an image."""
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
    return Image.fromarray(cube.reshape(17 * 17, 17, 3))


def _from_lab(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


# ---------------------------------------------------------------- more than 8 bits


def _scaled(image: Image.Image) -> Image.Image:
    """A one-channel image of 16-bit, 32-bit or float values as 8-bit gray."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode == "I" and tags and _one(tags.get(TIFF_FORMAT, 1)) == 1:
        values = values.view(np.uint32)  # Pillow has no unsigned mode, and keeps the bits
    least, most = _range(image.mode, tags)
    gray = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), ROWS):
        rows = values[top : top + ROWS].astype(np.float64)
        low, high = rows.min(), rows.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("values that are not finite")
        if low < least or high > most:
            raise ValueError(
                f"values from {low:g} to {high:g}, beyond its range of {least:g} to {most:g}: save "
                "it with 8 or 16 bits, or say its range in SMinSampleValue and SMaxSampleValue"
            )
        scaled = np.round((rows - least) * (255 / (most - least)))
        gray[top : top + ROWS] = scaled
    if tags.get(TIFF_PHOTOMETRIC) == 0:  # "WhiteIsZero"; Pillow minds it with 8 bits only
        gray = 255 - gray
    if isinstance(hole := image.info.get("transparency"), int):
        gray[values == hole] = 255
    return Image.fromarray(gray)


def _range(mode: str, tags: Any) -> tuple[float, float]:
    """Values of black and white.

    SMinSampleValue and SMaxSampleValue say it; without them unsigned 16-bit values go from 0 to
    their largest, float ones from 0 to 1.

    Raises:
        ValueError: the range is not declared, or empty.
    """
    least, most = (tags.get(tag) for tag in (TIFF_LEAST, TIFF_MOST))
    bits = _one(tags.get(TIFF_BITS, 16))
    if mode == "F":
        known = (0.0, 1.0)
    elif bits <= 16 and _one(tags.get(TIFF_FORMAT, 1)) == 1:
        known = (0.0, 2.0**bits - 1)
    elif least is None or most is None:
        raise ValueError(
            f"signed or {bits:g}-bit values, whose range it does not say: save it with 8 or 16 "
            "bits, or say its range in SMinSampleValue and SMaxSampleValue"
        )
    else:
        known = (0.0, 0.0)
    low = known[0] if least is None else float(_one(least))
    high = known[1] if most is None else float(_one(most))
    if not low < high or not np.isfinite([low, high]).all():
        raise ValueError(f"a range of values from {low:g} to {high:g}")
    return low, high


def _one(value: Any) -> Any:
    """A tag's value, or the first of its values."""
    return value[0] if isinstance(value, tuple) else value
