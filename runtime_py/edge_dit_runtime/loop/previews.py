"""Pictures painted while a run trains; `edge_dit_runtime.page.previews` has their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

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


class PreviewPainter(Protocol):
    """What paints previews.

    Attributes:
        prompts: of the previews.
        side: of a picture, pixels.
    """

    @property
    def prompts(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def side(self) -> int: ...  # noqa: D102

    def picture(self, row: int, adapter: Mapping[str, np.ndarray]) -> np.ndarray:
        """A picture of prompt ``row``, [side, side, 3] uint8, always from the same noise.

        Args:
            row: number of the prompt, which is the noise's seed too.
            adapter: LoRA tensors by their names in diffusers.
        """
        ...


class LoopPainter:
    """A `PreviewPainter` of the loop's parts: the bundle's preview prompts.

    Args:
        parts: of the bundle.
    """

    def __init__(self, parts: Parts) -> None:
        self._painter, self._numbers = Painter(parts), parts.facts.previews
        self.prompts = [parts.facts.prompts[number] for number in self._numbers]
        self.side = self._painter.painting.side

    def picture(self, row: int, adapter: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `PreviewPainter.picture`."""
        return self._painter.picture(Request(self._numbers[row], seed=row), adapter)


class Previews:
    """Paints prompts into a run folder while it trains.

    Args:
        painter: of the pictures.
        folder: of the run.
        every: steps between previews.
        steps: of the whole run.
    """

    def __init__(self, painter: PreviewPainter, folder: Path, every: int, steps: int) -> None:
        self._painter, self._folder = painter, folder
        self._every, self._steps = every, steps

    def due(self, step: int) -> bool:
        """Whether something is to be painted after ``step`` steps: at the first, every so many, and
        at the last, unless it is there.
        """
        wanted = step % self._every == 0 or step == self._steps
        return wanted and bool(self._missing(step))

    def _missing(self, step: int) -> list[int]:
        """Numbers of the prompts without a picture after ``step`` steps."""
        rows = range(len(self._painter.prompts))
        return [row for row in rows if not (self._folder / FOLDER / name_of(step, row)).is_file()]

    def paint(self, step: int, adapter: Mapping[str, np.ndarray]) -> None:
        """Paint what is missing after ``step`` steps; write the sheet.

        Args:
            step: steps done.
            adapter: LoRA tensors by their names in diffusers.
        """
        write_prompts(self._folder, list(self._painter.prompts))
        for row in self._missing(step):
            path = self._folder / FOLDER / name_of(step, row)
            write_picture(path, self._painter.picture(row, adapter))
        self._write_sheet()

    def _write_sheet(self) -> None:
        painted = read_previews(self._folder)
        steps = chosen(sorted({step for row in painted for step in row.pictures}))
        rows = {
            text: [self._read(step, row) for step in steps]
            for row, text in enumerate(self._painter.prompts)
        }
        write_picture(self._folder / SHEET, contact_sheet("", rows, [f"{s} steps" for s in steps]))

    def _read(self, step: int, row: int) -> np.ndarray:
        """A preview; gray where a stopped run did not paint it."""
        path, side = self._folder / FOLDER / name_of(step, row), self._painter.side
        if not path.is_file():
            return np.full((side, side, 3), 128, np.uint8)
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
