"""What a folder of pictures holds: pictures, files that may hold captions, and what is left out.

Nothing is left out without a word: whatever is not hidden and not read is listed with a reason.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath

from PIL import features

from edge_dit.errors import EXTRA_OF, BadInput, is_installed
from edge_dit.pictures.masks import ENDING as MASK

HEIF = "pillow_heif"
"""Module that reads .heic files; an extra, see `edge_dit.errors.EXTRA_OF`."""
FORMATS = {
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".heic", ".heif", ".hif"), "HEIF"),
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    ".webp": "WEBP",
    ".gif": "GIF",
    ".avif": "AVIF",
}
"""Ending of a picture's name, in lower case -> its format."""
SIDE_CARS = (".txt", ".caption")
"""Endings of files that hold the caption of the picture of the same stem."""
TABLES = ("metadata.jsonl", "metadata.csv")
"""Files that hold captions of many pictures, as Hugging Face's imagefolder names them."""
HIDDEN = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir"}
"""Names, in lower case, of what systems put into folders; names with a leading dot likewise."""
REPEATS = re.compile(r"\d{1,4}_.+", re.ASCII)
"""Kohya's names of folders: "10_sks toy" is read ten times there."""
COUNTED = 10_000
"""Most entries of a sub-folder that are looked at to say how many pictures it holds."""
REASONS = {
    "a camera's raw file: save it as PNG or JPEG": ".raw .cr2 .cr3 .nef .arw .dng .orf .rw2 .raf",
    "a video: save the frames you want as PNG": ".mp4 .mov .avi .mkv .webm .m4v .mpg .mpeg .wmv",
    "an archive: unpack it": ".zip .tar .gz .tgz .7z .rar",
    "an unfinished download": ".crdownload .part .download .tmp",
    "captions are read from .txt, .caption, metadata.jsonl and metadata.csv": ".json .jsonl .csv "
    ".parquet .tsv .yaml .yml .xml .xmp .md .cap .tags",
}
"""Why a file is left out, by the endings of its name."""


@dataclass(frozen=True)
class LeftOut:
    """Something in a folder that is not read: its name relative to the folder, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """The content of a folder; names are relative to it, with ``/`` between folders.

    Attributes:
        folder: that was listed.
        pictures: sorted, folder by folder.
        side_cars: files that may hold the caption of one picture.
        tables: files that may hold captions of many.
        masks: files that may be the loss mask of a picture (`edge_dit.pictures.masks`).
        left_out: everything else that is not hidden.
        notes: what else to say about a name.
        faults: pictures whose names cannot be written into a bank.
    """

    folder: Path
    pictures: list[str] = field(default_factory=list)
    side_cars: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[LeftOut] = field(default_factory=list)
    faults: list[BadInput] = field(default_factory=list)


def shown(name: str) -> str:
    """A name as it can be printed and written as JSON: control characters and bytes that are not
    UTF-8 are escaped.
    """
    return "".join(c if unicodedata.category(c) not in UNPRINTED else ascii(c)[1:-1] for c in name)


UNPRINTED = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories of control characters, bytes that are not UTF-8, and line separators."""


def repeats_of(name: str) -> int:
    """How often the folder that a picture is in says it is read: "10_toy/a.png" ten times, else
    once.
    """
    parent = PurePosixPath(name).parent.name
    return max(1, int(parent.partition("_")[0])) if REPEATS.fullmatch(parent) else 1


def list_folder(folder: Path, recursive: bool = False, folder_repeats: bool = False) -> Listing:
    """List a folder, with ``recursive`` its sub-folders too; with ``folder_repeats`` nothing is
    said of names that ask for repeats.

    Raises:
        BadInput: there is no such folder, or it cannot be read.
    """
    if not os.path.isdir(folder):
        raise BadInput(folder, found="no such folder", expected="a folder of images")
    listing = Listing(folder)
    seen, waiting = {os.path.realpath(folder)}, [""]
    while waiting:
        prefix = waiting.pop()
        try:
            names = sorted(os.listdir(folder / prefix))
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
            if not prefix:
                raise BadInput(folder, found=reason, remedy="make the folder readable") from None
            listing.left_out.append(LeftOut(shown(prefix), reason))
            continue
        for name in names:
            if is_hidden(name):
                continue
            path, inside = folder / prefix / name, f"{prefix}/{name}" if prefix else name
            if not os.path.isdir(path):  # unlike Path.is_dir it raises nothing
                _place(listing, path, inside)
            elif not recursive:
                listing.left_out.append(LeftOut(shown(inside), _unread(path)))
            elif (real := os.path.realpath(path)) in seen:
                reason = "leads to a folder that is read already"
                listing.left_out.append(LeftOut(shown(inside), reason))
            else:
                seen.add(real)
                waiting.append(inside)
                if REPEATS.fullmatch(name) and not folder_repeats:
                    reason = "repeats are not applied: each picture in it counts once, unless "
                    reason += "[data] folder_repeats = true"
                    listing.notes.append(LeftOut(shown(inside), reason))
    for names in (listing.pictures, listing.side_cars, listing.tables):
        names.sort(key=PurePosixPath)
    listing.left_out.sort(key=lambda entry: PurePosixPath(entry.name))
    return listing


def is_hidden(name: str) -> bool:
    """Whether a name is a system's own, not the user's; a picture that iCloud has not brought is
    ``.NAME.icloud``, and is the user's.
    """
    return (name.startswith(".") and not name.endswith(".icloud")) or name.lower() in HIDDEN


def _place(listing: Listing, path: Path, name: str) -> None:
    """Put a file where it belongs in a listing."""
    suffix = path.suffix.lower()
    if reason := _not_a_file(path) or _cannot_be_read(suffix):
        listing.left_out.append(LeftOut(shown(name), reason))
    elif name.lower().endswith(MASK):
        listing.masks.append(name)
    elif suffix in FORMATS:
        if shown(name) == name:
            listing.pictures.append(name)
            return
        found = "a name with control characters, or not UTF-8"
        place = listing.folder / shown(name)
        listing.faults.append(BadInput(place, found=found, remedy="rename it"))
    elif suffix in SIDE_CARS:
        listing.side_cars.append(name)
    elif path.name.lower() in TABLES:
        listing.tables.append(name)
    else:
        listing.left_out.append(LeftOut(shown(name), _why(path)))


def _not_a_file(path: Path) -> str:
    """Why a path is no file that can be read; empty if it is one."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return ""
    except OSError as error:
        if path.is_symlink():
            return f"a broken link, to {shown(os.readlink(path))}"
        return f"cannot be looked at ({error.strerror})"
    return "not a file, but a pipe, a socket or a device"


def _cannot_be_read(suffix: str) -> str:
    """Why this installation reads no pictures of an ending; empty if it does."""
    kind = FORMATS.get(suffix)
    if kind == "HEIF" and not is_installed(HEIF):
        return f'{suffix} is read by pillow-heif: pip install "edge-dit[{EXTRA_OF[HEIF]}]"'
    if kind in ("AVIF", "WEBP") and not features.check(kind.lower()):
        return f"this Pillow does not read {suffix}: pip install -U pillow"
    return ""


def _why(path: Path) -> str:
    suffix = path.suffix.lower()
    if path.name.endswith(".icloud"):
        return "not downloaded from iCloud yet"
    for reason, suffixes in REASONS.items():
        if suffix in suffixes.split():
            return reason
    if not suffix:
        return "its name has no ending; if it is a picture, add that of its format"
    return f"{shown(suffix)} is no kind of picture that edge-dit reads: save it as PNG"


def _unread(path: Path) -> str:
    """What to say of a sub-folder that is not read."""
    entries = list(islice(_files_below(path), COUNTED))
    count = sum(Path(name).suffix.lower() in FORMATS for name in entries)
    if not count:
        return "a sub-folder without pictures"
    most = "at least " if len(entries) == COUNTED else ""
    words = f"a sub-folder with {most}{count} picture{'s' if count > 1 else ''}; "
    words += "[data] recursive = true reads it"
    return words + (", each once: repeats are not applied" if REPEATS.fullmatch(path.name) else "")


def _files_below(path: Path) -> Iterator[str]:
    for _, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield from (name for name in names if not is_hidden(name))
