"""Text of files and for people: decodes, reads times, writes sizes and tables."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # it begins as UTF-16's does
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte order mark -> encoding, of those that are not read."""
SECONDS = {"s": 1.0, "ms": 0.001}


def utf8(data: bytes) -> str:
    """Text of a file, without a byte order mark and with plain line ends.

    Raises:
        ValueError: not UTF-8; it says what the file looks like.
    """
    if mark := next((name for mark, name in MARKS.items() if data.startswith(mark)), None):
        raise ValueError(f"{mark}, by its byte order mark")
    if data.count(0) > len(data) // 4:
        raise ValueError("UTF-16 without a byte order mark, by its NUL bytes")
    if b"\0" in data:
        raise ValueError(f"a NUL byte at {data.index(0)}: not text")
    if data.lstrip().startswith(b"{\\rtf"):
        raise ValueError("rich text (RTF)")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte, line = data[error.start], data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"byte 0x{byte:02x} at {error.start}: not UTF-8, perhaps cp1252 (line {line})"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def printable(text: str) -> str:
    r"""``text`` with everything that is not for reading escaped: control characters, which could
    move the cursor or change colours, and parts of file names that are no text.

    Example:
        >>> printable("a\x1b[2Jb")
        'a\\x1b[2Jb'
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def seconds_of(text: object) -> float:
    """Seconds of "5s", "1.5 s", "800ms".

    Raises:
        ValueError: something else, or zero.
    """
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*(m?s)\s*", str(text), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ValueError("a time such as 5s or 800ms")
    return float(match[1]) * SECONDS[match[2].lower()]


def size(number: float) -> str:
    """Bytes for people: "1.5 GiB"."""
    for unit in ("MiB", "GiB", "TiB"):
        value = number / BINARY[unit]
        if value < 999.5:  # larger ones would be printed as 1e+03
            break
    return f"{value:.3g} {unit}"


def columns(headings: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Lines of a table: row names at the left, cells right-aligned below their headings.

    Args:
        headings: of the columns after the names.
        rows: name and cells of each row.
    """
    name_width = max(len(name) for name, _ in rows) + 2
    cells = [headings, *(row for _, row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(headings))]
    return [
        name.ljust(name_width) + "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True))
        for name, line in [("", headings), *rows]
    ]
