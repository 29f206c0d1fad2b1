"""A folder of pictures with captions: looked at whole, each picture decoded when it is used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from edge_dit.contract.bank import Listed
from edge_dit.errors import BadInput, raise_any
from edge_dit.pictures.captions import Captions, Counts, clean, nfc, read_captions
from edge_dit.pictures.folder import FORMATS, LeftOut, Listing, list_folder, repeats_of
from edge_dit.pictures.images import Header, read_alpha, read_header, read_mask, read_rgb, resized
from edge_dit.pictures.masks import ALPHA, ENDING
from edge_dit.progress import bar
from edge_dit.store.files import sha256

CACHE = 256 * 2**20
"""Bytes of decoded pictures that are kept: 55 pictures of 1024 x 1536 pixels."""
LISTED = 10
"""Most names of a list that is printed for people."""


@dataclass(frozen=True)
class SubjectFolder:
    """A folder of pictures of one subject, and what becomes of them.

    Attributes:
        images: the folder.
        prompt: caption of pictures without one of their own.
        recursive: whether sub-folders are read.
        trigger: words that are put before each caption that lacks them.
        caption_lines: whether each line of a caption is one of its own, of which a draw takes one.
        caption_dropout: share of the draws that have the empty prompt.
        folder_repeats: whether pictures in a sub-folder "10_name" are repeated ten times.
        alpha_masks: whether alpha channels are loss masks.
        repeats: turns that each picture has.
        weight: of the loss of each draw.
    """

    images: Path
    prompt: str | None = None
    recursive: bool = False
    trigger: str | None = None
    caption_lines: bool = False
    caption_dropout: float = 0.0
    folder_repeats: bool = False
    alpha_masks: bool = False
    repeats: int = 1
    weight: float = 1.0

    def captions(self, text: str) -> tuple[str, ...]:
        """What a picture with a caption ``text`` is prompted with, each once."""
        trigger = clean(self.trigger or "")
        lines = [clean(line) for line in text.split("\n")] if self.caption_lines else [text]
        named = [
            line if trigger.casefold() in line.casefold() else f"{trigger}, {line}"
            for line in lines
            if line
        ]
        return tuple(dict.fromkeys(named))


@dataclass(frozen=True)
class Captioned:
    """One training picture.

    Attributes:
        name: relative to the folder, with ``/`` between folders.
        sha256: of the file's bytes.
        captions: its own, else the job's prompt; a draw has one of them.
        size: height and width of `pixels`; the shorter side is the job's resolution.
        upscaled: whether the file was smaller than that and is enlarged.
        load: decodes the picture: [H, W, 3] uint8.
        dropout: share of its draws that have the empty prompt.
        repeats: turns it has while a picture without repeats has one.
        weight: of its loss.
        mask: [H, W] float32 in [0, 1], what of the picture is learned; None for all of it.
        mask_sha256: of the mask's file; "alpha" if it is the picture's alpha channel.
        prior: whether its draws keep what the base model predicts
            (`with_prior`).
    """

    name: str
    sha256: str
    captions: tuple[str, ...]
    size: tuple[int, int]
    upscaled: bool
    load: Callable[[], np.ndarray] = field(repr=False, compare=False)
    dropout: float = 0.0
    repeats: int = 1
    weight: float = 1.0
    prior: bool = False
    mask: Callable[[], np.ndarray] | None = field(default=None, repr=False, compare=False)
    mask_sha256: str = ""

    @property
    def caption(self) -> str:
        """The first of its captions."""
        return self.captions[0]

    def listed(self, prompts: tuple[int, ...]) -> Listed:
        """Its entry in a bank's index.

        Args:
            prompts: numbers of its prompts, if it has a choice of them.
        """
        kept = (self.dropout, self.repeats, self.weight, self.prior, self.mask_sha256)
        return Listed(self.name, self.sha256, prompts, *kept)

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
        masks: name of a picture -> that of its loss mask.
    """

    listing: Listing
    captions: Captions
    headers: dict[str, Header]
    masks: dict[str, str] = field(default_factory=dict)

    @property
    def left_out(self) -> list[LeftOut]:
        """All that is neither a picture nor a caption of one."""
        used = set(self.masks.values())
        masks = [LeftOut(n, "a mask of no picture") for n in self.listing.masks if n not in used]
        every = [*self.listing.left_out, *self.captions.left_out, *masks]
        return sorted(every, key=lambda e: e.name)

    @property
    def notes(self) -> list[LeftOut]:
        """What is not taken from pictures that are read."""
        of = [LeftOut(name, note) for name, head in self.headers.items() for note in head.notes]
        return self.listing.notes + of

    def counts(self, name: str, subject: SubjectFolder) -> Counts:
        """How often a picture is drawn and what its loss weighs: the folder's, times a table's,
        times that of a sub-folder's name where that counts.
        """
        own = self.captions.counts.get(name, Counts())
        named = repeats_of(name) if subject.folder_repeats else 1
        return Counts(subject.repeats * own.repeats * named, subject.weight * own.weight)

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

    def in_words(self, caption_lines: bool = False) -> list[str]:
        """What was found, as lines for people.

        Args:
            caption_lines: whether each line of a caption is one of its own.
        """
        own, without = self.captions.of, self.uncaptioned
        lines = [f"{len(self.listing.pictures)} pictures, {len(own)} with a caption of their own"]
        if without:
            more = f" and {len(without) - LISTED} more" if len(without) > LISTED else ""
            names = "" if not own else f": {', '.join(without[:LISTED])}{more}"
            lines.append(f"{len(without)} without take [data] prompt{names}")
        if self.masks:
            lines.append(f"{len(self.masks)} have a mask: what is black there is not learned")
        several = sum("\n" in caption.text for caption in own.values())
        if several and caption_lines:
            lines.append(f"{several} captions of several lines: each draw takes one of the lines")
        elif several:
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


def survey(folder: Path, recursive: bool = False, folder_repeats: bool = False) -> Survey:
    """Look at a folder: its pictures, their captions, and all that is left out.

    Args:
        folder: with the pictures.
        recursive: whether sub-folders are read.
        folder_repeats: whether sub-folders are repeated as their names say.

    Raises:
        BadInput: no such folder, no picture in it, faults of names, captions and pictures; all
            together.
    """
    listing = list_folder(folder, recursive, folder_repeats)
    if not listing.pictures and not listing.faults:
        left = "; ".join(f"{entry.name}: {entry.reason}" for entry in listing.left_out[:3])
        raise BadInput(
            folder,
            found="no image in it" + (f" (left out: {left})" if left else ""),
            expected=f"at least one {', '.join(FORMATS)} file",
            remedy="point [data] images at the folder that holds the images themselves",
        )
    captions, headers, masks = read_captions(listing), {}, _masks_of(listing)
    faults = [*listing.faults, *captions.faults]
    for name in listing.pictures:
        try:
            headers[name] = read_header(folder / name)
            if name in masks:
                _check_mask(folder / masks[name], read_header(folder / masks[name]), headers[name])
        except BadInput as fault:
            faults.append(fault)
    raise_any(folder, faults)
    return Survey(listing, captions, headers, masks)


def _masks_of(listing: Listing) -> dict[str, str]:
    """Name of a picture -> name of its mask."""
    by_stem = {nfc(name[: -len(ENDING)]): name for name in listing.masks}
    stems = {name: nfc(str(PurePosixPath(name).with_suffix(""))) for name in listing.pictures}
    return {name: by_stem[stem] for name, stem in stems.items() if stem in by_stem}


def _check_mask(path: Path, mask: Header, picture: Header) -> None:
    """Raise `BadInput` unless a mask has the sides of its picture."""
    if mask.size != picture.size:
        (height, width), (tall, wide) = mask.size, picture.size
        raise BadInput(
            path,
            found=f"a mask of {width} x {height} pixels, its picture has {wide} x {tall}",
            expected="the same size, upright",
            remedy="save the mask in the picture's size",
        )


def captions_of(found: Survey, subject: SubjectFolder) -> list[tuple[str, ...]]:
    """The captions of each picture, distinct ones.

    Args:
        found: from `survey`.
        subject: says where captions are from, and what goes before them.

    Raises:
        BadInput: a picture has none; all such pictures together.
    """
    return [subject.captions(text) for text in found.prompts(subject.prompt)]


def with_prior(
    pictures: Sequence[Captioned],
    prompts: Sequence[str],
    weight: float,
    drawn: Sequence[Captioned] = (),
) -> list[Captioned]:
    """Pictures, and after them those of prior draws. Only the noised latents of these matter: what
    they should be denoised to is the base model's prediction.

    Args:
        pictures: of the subjects.
        prompts: of the prior draws; each has one of them.
        weight: of their loss.
        drawn: pictures of the prior draws, with captions of their own; default those of the
            subjects, with ``prompts``.
    """
    captions = tuple(dict.fromkeys(clean(text) for text in prompts))
    plain = {"dropout": 0.0, "repeats": 1, "mask": None, "mask_sha256": ""}
    own = [replace(picture, captions=captions, **plain) for picture in pictures]
    prior = [replace(picture, weight=weight, prior=True) for picture in drawn or own]
    return [*pictures, *prior]


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
    return read_folders([SubjectFolder(folder, prompt, recursive)], resolution, say)


def read_folders(
    subjects: Sequence[SubjectFolder],
    resolution: int,
    say: Callable[[str], None] = lambda line: None,
) -> list[Captioned]:
    """Read the pictures of several folders, as `read_folder`. Names in folders after the first
    have the folder's number and name before them.

    Args:
        subjects: folders, and what becomes of their pictures.
        resolution: length of every picture's shorter side after reading, in pixels.
        say: is told what is left out.

    Raises:
        BadInput: as `survey`; or a picture without a caption.
    """
    decoded, pictures = _Decoded(resolution), []
    for number, subject in enumerate(subjects, 1):
        folder = subject.images
        found = survey(folder, subject.recursive, subject.folder_repeats)
        for line in found.in_words(subject.caption_lines)[1:]:
            say(f"{folder.name}: {line}")
        before = f"{number}-{folder.name}/" if number > 1 else ""
        for name, captions in zip(found.listing.pictures, captions_of(found, subject), strict=True):
            try:
                digest = sha256(folder / name)
            except OSError as error:
                raise BadInput(folder / name, found=f"unreadable ({error.strerror})") from None
            size = found.headers[name].size
            after = resized(size, resolution)
            counts = found.counts(name, subject)
            mask, mask_sha256 = _mask_of(found, name, digest, subject, resolution)
            pictures.append(
                Captioned(
                    before + name,
                    digest,
                    captions,
                    after,
                    upscaled=min(size) < resolution,
                    load=partial(decoded.read, folder / name, digest, after),
                    dropout=subject.caption_dropout,
                    repeats=counts.repeats,
                    weight=counts.weight,
                    mask=mask,
                    mask_sha256=mask_sha256,
                )
            )
    return pictures


def _mask_of(
    found: Survey, name: str, digest: str, subject: SubjectFolder, resolution: int
) -> tuple[Callable[[], np.ndarray] | None, str]:
    """What reads the mask of a picture, and the mask's digest; None and "" without one.

    Raises:
        BadInput: its file is unreadable, or there is an alpha channel to use as well.
    """
    folder = subject.images
    if name in found.masks:
        path = folder / found.masks[name]
        if subject.alpha_masks:
            found_both = "a mask beside a picture, and [data] alpha_masks = true"
            raise BadInput(path, found=found_both, remedy="remove one of the two")
        try:
            own = sha256(path)
        except OSError as error:
            raise BadInput(path, found=f"unreadable ({error.strerror})") from None
        return partial(read_mask, path, own, resolution), own
    if subject.alpha_masks:
        return partial(read_alpha, folder / name, digest, resolution), ALPHA
    return None, ""


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
                if picture.mask is not None:
                    picture.mask()
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
