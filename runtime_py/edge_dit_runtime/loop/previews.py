"""Pictures painted while a run trains; `edge_dit_runtime.page.previews` has their names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from edge_dit.pictures.images import write_picture
from edge_dit.pictures.sheet import contact_sheet
from edge_dit_runtime.loop.paint import Painter, Request
from edge_dit_runtime.loop.parts import Parts
from edge_dit_runtime.page.previews import (
    FOLDER,
    SHEET,
    chosen,
    name_of,
    read_previews,
    write_prompts,
)


class Previews:
    """Paints the bundle's preview prompts into a run folder, always from the same noise.

    Args:
        parts: of the bundle.
        folder: of the run.
        every: steps between previews.
        steps: of the whole run.
    """

    def __init__(self, parts: Parts, folder: Path, every: int, steps: int) -> None:
        self._painter, self._folder = Painter(parts), folder
        self._every, self._steps = every, steps
        self._prompts = {n: parts.facts.prompts[n] for n in parts.facts.previews}

    def due(self, step: int) -> bool:
        """Whether a preview is painted after ``step`` steps: at the first, every so many, and at
        the last.
        """
        return step % self._every == 0 or step == self._steps

    def paint(self, step: int, adapter: Mapping[str, np.ndarray]) -> None:
        """Paint what is missing after ``step`` steps; write the sheet.

        Args:
            step: steps done.
            adapter: LoRA tensors by their names in diffusers.
        """
        write_prompts(self._folder, list(self._prompts.values()))
        for row, prompt in enumerate(self._prompts):
            path = self._folder / FOLDER / name_of(step, row)
            if not path.is_file():
                write_picture(path, self._painter.picture(Request(prompt, seed=row), adapter))
        self._write_sheet()

    def _write_sheet(self) -> None:
        painted = read_previews(self._folder)
        steps = chosen(sorted({step for row in painted for step in row.pictures}))
        rows = {
            text: [self._read(step, row) for step in steps]
            for row, text in enumerate(self._prompts.values())
        }
        write_picture(self._folder / SHEET, contact_sheet("", rows, [f"{s} steps" for s in steps]))

    def _read(self, step: int, row: int) -> np.ndarray:
        """A preview; gray where a stopped run did not paint it."""
        path, side = self._folder / FOLDER / name_of(step, row), self._painter.painting.side
        if not path.is_file():
            return np.full((side, side, 3), 128, np.uint8)
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
