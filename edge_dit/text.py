"""Text for people: sizes and tables; reads times."""

from __future__ import annotations

import re
from collections.abc import Sequence

BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SECONDS = {"s": 1.0, "ms": 0.001}


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
