"""Where captions come from: files beside the pictures, and tables as imagefolder has them."""

from __future__ import annotations

import csv
import io
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from edge_dit.errors import BadInput
from edge_dit.pictures.folder import LeftOut, Listing, shown
from edge_dit.store.documents import parse_json, read_whole
from edge_dit.store.files import open_regular
from edge_dit.text import utf8

COLUMNS = ("text", "caption", "prompt")
"""Names of a table's column of captions: imagefolder's, and those that trainers' options name."""
FILE_NAME = "file_name"
REPEATED, WEIGHED = "repeats", "weight"
"""Columns of a table that say how often a picture is drawn, and what its loss weighs."""
MOST = 1000
"""Most repeats, and largest weight, of a picture."""
LONGEST = 64 * 2**10
"""Largest file of one caption, bytes; text encoders read a few hundred words."""
UNSEEN = (
    "\u00ad\u061c\u115f\u1160\u180e\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e"
    "\u2060\u2061\u2062\u2063\u2064\u2066\u2067\u2068\u2069\u2800\u3164\ufeff\uffa0"
)
"""Characters that print nothing, or a blank, and that Python's `strip` leaves."""
BLANK = UNSEEN + "".join(map(chr, (*range(33), *range(127, 161)))) + "\u2028\u2029\u3000"
"""What is cut off both ends of a caption: those, white space and control characters."""


@dataclass(frozen=True)
class Caption:
    """A caption and the name of the file that it is from, a table's with its line."""

    text: str
    source: str


@dataclass(frozen=True)
class Counts:
    """How often a picture is drawn while others are drawn once, and what its loss weighs."""

    repeats: int = 1
    weight: float = 1.0


@dataclass(frozen=True)
class Captions:
    """Captions of a folder.

    Attributes:
        of: name of a picture -> its caption; pictures without one are missing.
        counts: name of a picture -> what a table says of repeats and weight.
        used: names of the files that they are from.
        left_out: files that look like captions and are of no picture.
        faults: everything wrong with them.
    """

    of: dict[str, Caption] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    faults: list[BadInput] = field(default_factory=list)


def nfc(text: str) -> str:
    """The composed form: systems write the same name with composed or decomposed letters."""
    return unicodedata.normalize("NFC", text)


def clean(text: str) -> str:
    """A caption as it goes to the text encoder.

    Line ends become line feeds, letters are composed (NFC), and what prints nothing is cut off both
    ends. Lines are kept. Empty if nothing that prints is in it.
    """
    text = nfc(text.replace("\r\n", "\n").replace("\r", "\n")).strip().strip(BLANK).strip()
    seen = any(unicodedata.category(c)[0] in "LNPS" and c not in UNSEEN for c in text)
    return text if seen else ""


def decoded(path: Path, data: bytes) -> str:
    """The text of a file.

    Raises:
        BadInput: it is not UTF-8; the message says what it looks like.
    """
    try:
        return utf8(data)
    except ValueError as error:
        raise BadInput(
            path, found=str(error), expected="plain text in UTF-8", remedy="save it as UTF-8"
        ) from None


def checked(place: object, text: object) -> str:
    """A caption, cleaned.

    Raises:
        BadInput: it is no text, or an empty one.
    """
    if not isinstance(text, str) or "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise BadInput(place, found=f"a caption that is no text: {text!r:.60}", expected="text")
    if len(text) > LONGEST:
        raise BadInput(place, found=f"{len(text)} characters", expected=f"at most {LONGEST}")
    if not (words := clean(text)):
        remedy = "write one, or remove it to use [data] prompt"
        raise BadInput(place, found="empty caption", expected="text", remedy=remedy)
    return words


def read_captions(listing: Listing) -> Captions:
    """Find the captions of a listing's pictures; two that differ for one picture are a fault."""
    found = Captions()
    sources: dict[str, list[Caption]] = defaultdict(list)
    _side_cars(listing, found, sources)
    for table in listing.tables:
        _table(listing, table, found, sources)
    for name, captions in sources.items():
        found.of[name] = captions[0]
        other = next((c for c in captions if c.text != captions[0].text), None)
        if other is not None:
            two = f"{captions[0].source} says {captions[0].text!r:.60}, "
            two += f"{other.source} says {other.text!r:.60}"
            remedy = "keep one of them"
            found.faults.append(
                BadInput(listing.folder / name, found=two, expected="one caption", remedy=remedy)
            )
    return found


def _side_cars(listing: Listing, found: Captions, sources: dict[str, list[Caption]]) -> None:
    """Captions in files of a picture's stem. Names are compared composed; a stem that differs in
    case alone counts if there is no other, as it does on Windows and macOS.
    """
    beside = defaultdict(list)
    for name in listing.side_cars:
        beside[_stem(name).casefold()].append(name)
    texts: dict[str, str] = {}
    tried: set[str] = set()
    for picture in listing.pictures:
        near = beside[_stem(picture).casefold()]
        for name in [n for n in near if _stem(n) == _stem(picture)] or near:
            if name not in tried:
                tried.add(name)
                try:
                    texts[name] = _side_car(listing.folder / name)
                except BadInput as fault:
                    found.faults.append(fault)
            if name in texts:
                sources[picture].append(Caption(texts[name], name))
    pictures = {nfc(name) for name in listing.pictures}
    left = {_stem(entry.name) for entry in listing.left_out}
    for name in listing.side_cars:
        if name in tried:
            found.used.append(name)
            continue
        reason = f"a caption, but no picture is named {PurePosixPath(shown(_stem(name))).name}"
        if _stem(name) in pictures:
            reason = f"a caption, but named {shown(_stem(name))} + its ending: leave .png etc. out"
        elif _stem(name) in left:
            reason = "a caption, but its picture is left out"
        found.left_out.append(LeftOut(shown(name), reason))


def _stem(name: str) -> str:
    return nfc(str(PurePosixPath(name).with_suffix("")))


def _side_car(path: Path) -> str:
    try:
        with open_regular(path) as file:
            data = file.read(LONGEST + 1)
    except OSError as error:
        raise BadInput(path, found=f"unreadable caption ({error.strerror or error})") from None
    if len(data) > LONGEST:
        found = f"more than {LONGEST // 2**10} KiB"
        raise BadInput(path, found=found, expected="a caption", remedy="shorten it, or rename it")
    return checked(path, decoded(path, data))


# ---------------------------------------------------------------- tables


def _table(listing: Listing, name: str, found: Captions, sources: dict[str, list[Caption]]) -> None:
    """Captions of a metadata.jsonl or metadata.csv; its file names are relative to it."""
    path = listing.folder / name
    rows = 0
    try:
        table = _lines(path) if path.suffix.lower() == ".jsonl" else _rows(path)
        known = _names(listing)
        for line, row in table:
            place = f"{path}:{line}"
            try:
                pictures = _pictures(listing, known, place, PurePosixPath(name).parent, row)
                if (counts := _counts(place, row)) is not None:
                    rows += 1
                    found.counts.update(dict.fromkeys(pictures, counts))
                if (text := _text(place, row)) is not None:
                    rows += 1
                    for picture in pictures:
                        sources[picture].append(Caption(text, f"{name}:{line}"))
            except BadInput as fault:
                rows += 1
                found.faults.append(fault)
    except BadInput as fault:
        found.faults.append(fault)
        return
    if rows:
        found.used.append(name)
    else:
        reason = f"no caption in it: no column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}"
        found.left_out.append(LeftOut(shown(name), reason))


def _names(listing: Listing) -> dict[str, list[str]]:
    """Composed name -> pictures of that name."""
    known = defaultdict(list)
    for picture in listing.pictures:
        known[nfc(picture)].append(picture)
    return dict(known)


def _whole(path: Path) -> str:
    try:
        return decoded(path, read_whole(path))
    except (OSError, ValueError) as error:
        raise BadInput(path, found=f"unreadable ({error})") from None


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of every line. Only line feeds end a line: JSON may hold U+2028."""
    for number, line in enumerate(_whole(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.encode())
        except ValueError as error:
            raise BadInput(f"{path}:{number}", found=f"not JSON ({error})") from None
        if not isinstance(row, dict):
            expected = 'an object a line: {"file_name": "a.png", "text": "a toy"}'
            raise BadInput(f"{path}:{number}", found="not a JSON object", expected=expected)
        yield number, row


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number of its last line, and cells, of every row."""
    reader = csv.reader(io.StringIO(_whole(path), newline=""), strict=True)
    try:
        columns = [cell.strip() for cell in next(reader, [])]
        if FILE_NAME not in columns or len(set(columns)) < len(columns):
            raise BadInput(
                f"{path}:1",
                found=f"columns {', '.join(columns)!r:.100}",
                expected=f"{FILE_NAME}, {COLUMNS[0]}, separated by commas, each once",
            )
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(columns):
                raise BadInput(
                    f"{path}:{reader.line_num}",
                    found=f"{len(cells)} cells",
                    expected=f"{len(columns)}, as the first line has",
                    remedy='put text that has commas in quotes: "a toy, red"',
                )
            yield reader.line_num, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise BadInput(f"{path}:{reader.line_num}", found=f"not CSV ({error})") from None


def _pictures(
    listing: Listing, known: dict[str, list[str]], place: str, base: PurePosixPath, row: Any
) -> list[str]:
    """The pictures that a row names.

    Raises:
        BadInput: there is none of that name; the message says why.
    """
    given = row.get(FILE_NAME)
    if not isinstance(given, str) or not given.strip():
        raise BadInput(place, found=f"no {FILE_NAME}", expected="the name of a picture")
    name = nfc(posixpath.normpath((base / given.replace("\\", "/")).as_posix()))
    if name in known:
        return known[name]
    if name.startswith(("../", "/")) or PureWindowsPath(given).drive:
        found = f"{FILE_NAME} {given!r:.80} leads out of the folder"
        raise BadInput(place, found=found, expected="a name relative to this file")
    left = {nfc(entry.name): entry.reason for entry in listing.left_out}
    above = [str(parent) for parent in (PurePosixPath(name), *PurePosixPath(name).parents)]
    reason = next((f"it is left out: {left[part]}" for part in above if part in left), "")
    near = [other for other in known if other.casefold() == name.casefold()]
    remedy = reason or (f"did you mean {near[0]}?" if near else "remove the line, or add the file")
    raise BadInput(place, found=f"no picture {given!r:.80}", remedy=remedy)


def _counts(place: str, row: dict[str, Any]) -> Counts | None:
    """Repeats and weight of a row; None where it says neither.

    Raises:
        BadInput: one of them is out of bounds.
    """
    given = {key: row[key] for key in (REPEATED, WEIGHED) if row.get(key) not in (None, "")}
    if not given:
        return None
    try:
        repeats, weight = (float(given.get(key, 1)) for key in (REPEATED, WEIGHED))
    except (TypeError, ValueError):
        repeats, weight = float("nan"), float("nan")
    if repeats not in range(1, MOST + 1) or not 0 < weight <= MOST:
        found = ", ".join(f"{key} {value!r:.30}" for key, value in given.items())
        expected = f"repeats: a whole number from 1 to {MOST}; weight: above 0, at most {MOST}"
        raise BadInput(place, found=found, expected=expected)
    return Counts(int(repeats), weight)


def _text(place: str, row: dict[str, Any]) -> str | None:
    """The caption of a row; None where it has no column of captions.

    Raises:
        BadInput: it is empty or no text, or two columns differ.
    """
    given = {column: row[column] for column in COLUMNS if column in row}
    filled = {column: value for column, value in given.items() if value not in (None, "")}
    if not given:
        return None
    texts = {column: checked(place, value) for column, value in (filled or given).items()}
    if len(set(texts.values())) > 1:
        two = ", ".join(f"{column} {text!r:.60}" for column, text in texts.items())
        raise BadInput(place, found=two, expected="one caption", remedy="keep one column")
    return next(iter(texts.values()))
