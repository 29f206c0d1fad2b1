"""Pictures on one sheet, in rows that each have a line of text above them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

STRIP = 16
"""Height in pixels of a line of text."""


def contact_sheet(
    title: str, rows: Mapping[str, Sequence[np.ndarray]], columns: Sequence[str] = ()
) -> np.ndarray:
    """The sheet, [H, W, 3] uint8.

    Args:
        title: above all.
        rows: text above the row -> its pictures, [S, S, 3] uint8, all of one size.
        columns: text under the title above each column; none by default.
    """
    side = next(iter(rows.values()))[0].shape[0]
    top = STRIP * (2 if columns else 1)
    wide = max(len(pictures) for pictures in rows.values())
    sheet = Image.new("RGB", (wide * side, top + len(rows) * (side + STRIP)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 2), title, fill="black")
    for number, text in enumerate(columns):
        draw.text((number * side + 4, STRIP + 2), text, fill="black")
    for row, (text, pictures) in enumerate(rows.items()):
        place = top + row * (side + STRIP)
        draw.text((4, place + 2), text, fill="black")
        for column, pixels in enumerate(pictures):
            sheet.paste(Image.fromarray(pixels), (column * side, place + STRIP))
    return np.asarray(sheet)
