"""Pictures of several prompts and seeds on one sheet, by the stock pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_dit.models.families.family import Family
from edge_dit.pictures import sheet
from edge_dit.progress import bar


def contact_sheet(
    family: Family, pipeline: Any, prompts: list[str], seeds: list[int], side: int, title: str
) -> np.ndarray:
    """Pictures of every prompt (rows) and seed (columns), with the prompt above each row; [H, W, 3]
    uint8.

    Args:
        family: of the pipeline.
        pipeline: that draws.
        prompts: one per row.
        seeds: one per column.
        side: of a picture, in pixels.
        title: of the sheet.
    """
    rows = {}
    with bar(title, len(prompts)) as advance:
        for prompt in prompts:
            rows[prompt] = [*map(np.asarray, family.sample(pipeline, prompt, side, seeds))]
            advance()
    return sheet.contact_sheet(title, rows)
