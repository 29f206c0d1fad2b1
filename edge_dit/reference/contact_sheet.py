"""Pictures of several prompts and seeds on one sheet."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw

from edge_dit.models.families.family import Family
from edge_dit.progress import bar

STRIP = 16
"""Height in pixels of the line above each row."""


def contact_sheet(
    family: Family, pipeline: Any, prompts: list[str], seeds: list[int], side: int, title: str
) -> Image.Image:
    """Pictures of every prompt (rows) and seed (columns), with the prompt above each row.

    Args:
        family: of the pipeline.
        pipeline: that draws.
        prompts: one per row.
        seeds: one per column.
        side: of a picture, in pixels.
        title: of the sheet.
    """
    height = STRIP + len(prompts) * (side + STRIP)
    sheet = Image.new("RGB", (len(seeds) * side, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 2), title, fill="black")
    with bar(title, len(prompts)) as advance:
        for row, prompt in enumerate(prompts):
            top = STRIP + row * (side + STRIP)
            draw.text((4, top + 2), prompt, fill="black")
            for column, picture in enumerate(family.sample(pipeline, prompt, side, seeds)):
                sheet.paste(picture, (column * side, top + STRIP))
            advance()
    return sheet
