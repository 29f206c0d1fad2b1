"""Read a folder of images and captions; an image that cannot be used is refused by name."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from edge_dit.errors import BadInput, ManyFaults

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Captioned:
    """One training image.

    Attributes:
        name: file name within the folder.
        sha256: of the file's bytes.
        caption: from the .txt file of the same stem, else the job's prompt.
        pixels: [3, H, W] float32 in [-1, 1]; the shorter side is the job's resolution.
        upscaled: whether the file was smaller than that and was enlarged.
    """

    name: str
    sha256: str
    caption: str
    pixels: np.ndarray
    upscaled: bool


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to upright 8-bit RGB.

    The EXIF rotation is applied, 16-bit values are scaled down, and transparent pixels are put on
    white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit, or 32-bit holding 16-bit values (PNG)
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray(np.clip(np.round(values / 257), 0, 255).astype(np.uint8))
    elif image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        top = 1.0 if np.nanmax(values) <= 1.0 else 255.0
        image = Image.fromarray(np.clip(np.round(values * 255 / top), 0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def read_image(path: Path, resolution: int) -> tuple[np.ndarray, bool]:
    """Read an image and resize its shorter side to ``resolution`` pixels.

    Returns:
        Pixels [3, H, W] float32 in [-1, 1], and whether the image was enlarged.

    Raises:
        BadInput: the file is not an image, truncated, unreadable, or huge.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                opened.load()
                image = to_rgb(opened)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise BadInput(
            path,
            found=f"not a readable image ({error})",
            expected=f"a whole {', '.join(s[1:] for s in SUFFIXES)} file",
            remedy="replace it or move it out of the folder",
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadInput(path, found=str(error), remedy="scale the image down first") from None
    short = min(image.size)
    if short != resolution:
        size = tuple(max(resolution, round(side * resolution / short)) for side in image.size)
        image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0
    return np.ascontiguousarray(pixels), short < resolution


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name.

    Raises:
        BadInput: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise BadInput(folder, found="no such folder", expected="a folder of images")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise BadInput(
            folder,
            found="no image in it",
            expected=f"at least one {', '.join(SUFFIXES)} file",
            remedy="point [data] images at the folder that holds the images themselves",
        )
    return files


def captions(files: list[Path], prompt: str | None) -> list[str]:
    """The caption of each image: the .txt file beside it, else ``prompt``.

    Raises:
        BadInput: an image has neither, or its .txt file is empty or not text; all faults together.
    """
    texts, faults = [], []
    for path in files:
        side_car = path.with_suffix(".txt")
        caption = prompt
        if side_car.is_file():
            try:
                caption = side_car.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                faults.append(BadInput(side_car, found=f"unreadable caption ({error})"))
                continue
        if not caption:
            faults.append(
                BadInput(
                    side_car if side_car.is_file() else path,
                    found="empty caption" if side_car.is_file() else "no caption",
                    expected=f"text in {side_car.name}, or [data] prompt in the job file",
                )
            )
            continue
        texts.append(caption)
    if faults:
        raise faults[0] if len(faults) == 1 else ManyFaults(files[0].parent, faults)
    return texts


def read_folder(folder: Path, prompt: str | None, resolution: int) -> list[Captioned]:
    """Read all images of a folder with their captions.

    Args:
        folder: with the images.
        prompt: caption of images without a .txt file; None if each must have one.
        resolution: length of every image's shorter side after reading, in pixels.

    Raises:
        BadInput: no such folder, no image in it, faults of captions or, if they are right, of
            images; all of a kind together.
    """
    files = image_files(folder)
    texts = captions(files, prompt)
    images, faults = [], []
    for path, caption in zip(files, texts, strict=True):
        try:
            pixels, upscaled = read_image(path, resolution)
        except BadInput as fault:
            faults.append(fault)
            continue
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        images.append(Captioned(path.name, digest, caption, pixels, upscaled))
    if faults:
        raise faults[0] if len(faults) == 1 else ManyFaults(folder, faults)
    return images
