"""Plain text for a terminal or a file."""

from __future__ import annotations

from collections.abc import Sequence


def columns(headings: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Lines of a table: row names at the left, cells right-aligned below their headings.

    Args:
        headings: of the columns behind the names.
        rows: name and cells of each row.
    """
    name_width = max(len(name) for name, _ in rows) + 2
    cells = [headings, *(row for _, row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(headings))]
    return [
        name.ljust(name_width) + "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True))
        for name, line in [("", headings), *rows]
    ]
