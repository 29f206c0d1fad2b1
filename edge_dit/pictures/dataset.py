"""A folder of pictures with captions: looked at whole, each picture decoded when it is used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edge_dit.errors import BadInput, raise_any
from edge_dit.pictures.captions import Captions, clean, read_captions
from edge_dit.pictures.folder import FORMATS, LeftOut, Listing, list_folder
from edge_dit.pictures.images import Header, read_header, read_rgb, resized
from edge_dit.progress import bar
from edge_dit.store.files import sha256

CACHE = 256 * 2**20
"""Bytes of decoded pictures that are kept: 55 pictures of 1024 x 1536 pixels."""
LISTED = 10
"""Most names of a list that is printed for people."""


@dataclass(frozen=True)
class Captioned:
    """One training picture.

    Attributes:
        name: relative to the folder, with ``/`` between folders.
        sha256: of the file's bytes.
        caption: its own, else the job's prompt.
        size: height and width of `pixels`; the shorter side is the job's resolution.
        upscaled: whether the file was smaller than that and is enlarged.
        load: decodes the picture: [H, W, 3] uint8.
    """

    name: str
    sha256: str
    caption: str
    size: tuple[int, int]
    upscaled: bool
    load: Callable[[], np.ndarray] = field(repr=False, compare=False)

    @property
    def pixels(self) -> np.ndarray:
        """[3, H, W] float32 in [-1, 1], decoded now or kept from the last time.

        Raises:
            BadInput: the file cannot be decoded, or changed since the folder was read.
        """
        pixels = self.load().astype(np.float32).transpose(2, 0, 1) / 127.5 - 1.0
        return np.ascontiguousarray(pixels)


@dataclass(frozen=True)
class Survey:
    """A folder that was looked at; no picture is decoded that says how long its file is.

    Attributes:
        listing: what is in it.
        captions: of its pictures.
        headers: of its pictures, by name.
    """

    listing: Listing
    captions: Captions
    headers: dict[str, Header]

    @property
    def left_out(self) -> list[LeftOut]:
        """All that is neither a picture nor a caption of one."""
        return sorted([*self.listing.left_out, *self.captions.left_out], key=lambda e: e.name)

    @property
    def notes(self) -> list[LeftOut]:
        """What is not taken from pictures that are read."""
        of = [LeftOut(name, note) for name, head in self.headers.items() for note in head.notes]
        return self.listing.notes + of

    @property
    def uncaptioned(self) -> list[str]:
        """Pictures without a caption of their own."""
        return [name for name in self.listing.pictures if name not in self.captions.of]

    def prompts(self, prompt: str | None) -> list[str]:
        """The caption of each picture: its own, else ``prompt``.

        Raises:
            BadInput: a picture has neither; all such pictures together.
        """
        default = clean(prompt or "")
        faults = [
            BadInput(
                self.listing.folder / name,
                found="no caption",
                expected=f"text in {Path(name).stem}.txt, or [data] prompt in the job file",
            )
            for name in ([] if default else self.uncaptioned)
        ]
        raise_any(self.listing.folder, faults)
        own = self.captions.of
        return [own[name].text if name in own else default for name in self.listing.pictures]

    def in_words(self) -> list[str]:
        """What was found, as lines for people."""
        own, without = self.captions.of, self.uncaptioned
        lines = [f"{len(self.listing.pictures)} pictures, {len(own)} with a caption of their own"]
        if without:
            more = f" and {len(without) - LISTED} more" if len(without) > LISTED else ""
            names = "" if not own else f": {', '.join(without[:LISTED])}{more}"
            lines.append(f"{len(without)} without take [data] prompt{names}")
        several = sum("\n" in caption.text for caption in own.values())
        if several:
            lines.append(f"{several} captions of several lines: each is one prompt, lines kept")
        return [*lines, *_few("left out", self.left_out), *_few("note", self.notes)]

    def as_json(self) -> dict[str, Any]:
        """The same, complete, for machines."""
        return {
            "pictures": len(self.listing.pictures),
            "captions": {name: caption.source for name, caption in self.captions.of.items()},
            "without_caption": self.uncaptioned,
            "left_out": [vars(entry) for entry in self.left_out],
            "notes": [{"name": e.name, "note": e.reason} for e in self.notes],
        }


def _few(title: str, entries: list[LeftOut]) -> list[str]:
    """The first entries, a line each; and how many more there are."""
    lines = [f"{title}: {entry.name}: {entry.reason}" for entry in entries[:LISTED]]
    if (more := len(entries) - LISTED) > 0:
        kinds = Counter(entry.reason for entry in entries[LISTED:]).most_common(3)
        words = "; ".join(f"{count} {reason}" for reason, count in kinds)
        lines.append(f"{title}: and {more} more ({words}): see --json")
    return lines


def survey(folder: Path, recursive: bool = False) -> Survey:
    """Look at a folder: its pictures, their captions, and all that is left out.

    Args:
        folder: with the pictures.
        recursive: whether sub-folders are read.

    Raises:
        BadInput: no such folder, no picture in it, faults of names, captions and pictures; all
            together.
    """
    listing = list_folder(folder, recursive)
    if not listing.pictures and not listing.faults:
        left = "; ".join(f"{entry.name}: {entry.reason}" for entry in listing.left_out[:3])
        raise BadInput(
            folder,
            found="no image in it" + (f" (left out: {left})" if left else ""),
            expected=f"at least one {', '.join(FORMATS)} file",
            remedy="point [data] images at the folder that holds the images themselves",
        )
    captions, headers = read_captions(listing), {}
    faults = [*listing.faults, *captions.faults]
    for name in listing.pictures:
        try:
            headers[name] = read_header(folder / name)
        except BadInput as fault:
            faults.append(fault)
    raise_any(folder, faults)
    return Survey(listing, captions, headers)


def read_folder(
    folder: Path,
    prompt: str | None,
    resolution: int,
    recursive: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[Captioned]:
    """Read a folder's pictures with their captions; each is decoded when its pixels are asked for.

    Args:
        folder: with the pictures.
        prompt: caption of pictures without one of their own; None if each must have one.
        resolution: length of every picture's shorter side after reading, in pixels.
        recursive: whether sub-folders are read.
        say: is told what is left out, where no plan has said it.

    Raises:
        BadInput: as `survey`; or a picture without a caption.
    """
    found = survey(folder, recursive)
    for line in found.in_words()[1:]:
        say(f"{folder.name}: {line}")
    prompts, decoded = found.prompts(prompt), _Decoded(resolution)
    pictures = []
    for name, caption in zip(found.listing.pictures, prompts, strict=True):
        try:
            digest = sha256(folder / name)
        except OSError as error:
            raise BadInput(folder / name, found=f"unreadable ({error.strerror})") from None
        size = found.headers[name].size
        load = partial(decoded.read, folder / name, digest, resized(size, resolution))
        small = min(size) < resolution
        pictures.append(Captioned(name, digest, caption, resized(size, resolution), small, load))
    return pictures


def check_readable(pictures: Iterable[Captioned]) -> None:
    """Decode pictures once, so that a damaged one is found before long work.

    Raises:
        BadInput: every picture that cannot be decoded, or changed; together.
    """
    wanted, faults = list(pictures), []
    with bar("pictures", len(wanted)) as advance:
        for picture in wanted:
            try:
                picture.load()
            except BadInput as fault:
                faults.append(fault)
            advance()
    raise_any("pictures", faults)


class _Decoded:
    """Decodes pictures and keeps as many as `CACHE` holds.

    The first ones are kept, not the last: draws take pictures in turns, and a cache of the last
    ones that is smaller than the folder would never hold the next.
    """

    def __init__(self, resolution: int) -> None:
        self.resolution = resolution
        self._kept: dict[Path, np.ndarray] = {}
        self._room = CACHE

    def read(self, path: Path, digest: str, size: tuple[int, int]) -> np.ndarray:
        """[H, W, 3] uint8 of a picture."""
        if path in self._kept:
            return self._kept[path]
        pixels = read_rgb(path, digest, self.resolution)
        if pixels.shape[:2] != size:
            found = f"{pixels.shape[:2]} pixels, where its header says {size}"
            raise BadInput(path, found=found, remedy="save it again")
        if pixels.nbytes <= self._room:
            self._room -= pixels.nbytes
            self._kept[path] = pixels
        return pixels
