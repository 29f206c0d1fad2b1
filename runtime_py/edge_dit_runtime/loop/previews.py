"""Pictures painted while a run trains, and a page that shows them grow.

previews/000100-0.png   the first preview prompt after 100 steps
previews.png            every prompt in a row, every preview in a column
run.html                that sheet and the losses; it reloads itself
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from edge_dit.pictures.images import write_picture
from edge_dit.pictures.sheet import contact_sheet
from edge_dit.store.files import write_atomic
from edge_dit_runtime.loop.paint import Painter, Request
from edge_dit_runtime.loop.parts import Parts
from edge_dit_runtime.run_folder import PICTURE

FOLDER, SHEET, PAGE = "previews", "previews.png", "run.html"
NAME = re.compile(r"(\d{6,})-(\d+)\.png")
MOST_COLUMNS = 8
"""Previews on the sheet; of more, evenly chosen ones, the first and the last among them."""
RELOAD = 10
"""Seconds after which a browser reads the page again."""
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="refresh" content="{reload}">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }}
img {{ display: block; margin: 1rem 0; max-width: 100% }}
.sheet {{ image-rendering: auto; width: 100% }}
</style>
<h1>{title}</h1>
<p>{done} of {steps} steps. Every row is a prompt, every column a preview.</p>
<img class="sheet" src="{sheet}" alt="previews by prompt and step">
{losses}
</html>
"""


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
        """Paint what is missing after ``step`` steps; write the sheet and the page.

        Args:
            step: steps done.
            adapter: LoRA tensors by their names in diffusers.
        """
        for row, prompt in enumerate(self._prompts):
            path = self._folder / FOLDER / f"{step:06d}-{row}.png"
            if not path.is_file():
                write_picture(path, self._painter.picture(Request(prompt, seed=row), adapter))
        self._write_sheet()
        self._write_page(step)

    def _write_sheet(self) -> None:
        found = (NAME.fullmatch(path.name) for path in (self._folder / FOLDER).iterdir())
        steps = sorted({int(match[1]) for match in found if match})
        chosen = np.linspace(0, len(steps) - 1, min(len(steps), MOST_COLUMNS)).round().astype(int)
        steps = [steps[place] for place in chosen]
        rows = {
            text: [self._read(step, row) for step in steps]
            for row, text in enumerate(self._prompts.values())
        }
        write_picture(self._folder / SHEET, contact_sheet("", rows, [f"{s} steps" for s in steps]))

    def _read(self, step: int, row: int) -> np.ndarray:
        """A preview; gray where a stopped run did not paint it."""
        path, side = self._folder / FOLDER / f"{step:06d}-{row}.png", self._painter.painting.side
        if not path.is_file():
            return np.full((side, side, 3), 128, np.uint8)
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))

    def _write_page(self, done: int) -> None:
        plotted = (self._folder / PICTURE).is_file()
        page = _PAGE.format(
            title=html.escape(self._folder.resolve().name),
            reload=RELOAD if done < self._steps else 3600,
            done=done,
            steps=self._steps,
            sheet=f"{SHEET}?{done}",
            losses=f'<img src="{PICTURE}" alt="losses">' if plotted else "",
        )
        write_atomic(self._folder / PAGE, page)
