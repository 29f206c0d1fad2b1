"""The pictures that a run painted while it trained, as files of its folder.

previews/000100-0.png   the first preview prompt after 100 steps
previews.json           the prompts
previews.png            every prompt in a row, every preview in a column
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from edge_dit.errors import BadInput
from edge_dit.store.documents import read_document, write_document
from edge_dit_runtime.page.html import data_uri

FOLDER, PROMPTS, SHEET = "previews", "previews.json", "previews.png"
NAME = re.compile(r"(\d{6,})-(\d+)\.png")
MOST = 8
"""Previews of a prompt that are shown; of more, evenly chosen ones, the first and the last among
them.
"""
THUMBNAIL = 384
"""Pixels of a preview's longer side on a page."""
STYLE = """
.previews { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(45%, 8rem), 1fr));
  gap: .75rem; margin: .5rem 0 1.5rem; }
.previews img { display: block; width: 100%; height: auto; border-radius: 3px;
  background: var(--panel); }
.previews figcaption { font-size: .85rem; color: var(--soft); padding-top: .2rem;
  overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Row:
    """Previews of a prompt.

    Attributes:
        number: of the prompt.
        prompt: its text; "" where nobody wrote it down.
        pictures: steps done -> file, ascending.
    """

    number: int
    prompt: str
    pictures: dict[int, Path]

    @property
    def title(self) -> str:
        """The prompt for people."""
        return self.prompt or f"preview {self.number + 1}"


def name_of(step: int, prompt: int) -> str:
    """File name of a preview."""
    return f"{step:06d}-{prompt}.png"


def write_prompts(folder: Path, prompts: Sequence[str]) -> None:
    """Write down the prompts of a run's previews."""
    write_document(folder / PROMPTS, {"prompts": list(prompts)})


def read_previews(folder: Path) -> list[Row]:
    """The previews of a run folder, by prompt; none where nothing was painted."""
    if not (folder / FOLDER).is_dir():
        return []
    found: dict[int, dict[int, Path]] = {}
    for path in (folder / FOLDER).iterdir():
        if match := NAME.fullmatch(path.name):
            found.setdefault(int(match[2]), {})[int(match[1])] = path
    prompts = {}
    with suppress(BadInput):  # runs of an older version have none
        read = read_document(folder / PROMPTS, "previews", "").get("prompts", [])
        prompts = {number: str(text) for number, text in enumerate(read)}
    return [
        Row(number, prompts.get(number, ""), dict(sorted(found[number].items())))
        for number in sorted(found)
    ]


def chosen(steps: Sequence[int]) -> list[int]:
    """At most `MOST` of ascending steps, evenly chosen."""
    places = np.linspace(0, len(steps) - 1, min(len(steps), MOST)).round().astype(int)
    return [steps[place] for place in places]


def picture(path: Path, alt: str, link: str = "") -> str:
    """A picture within a page, as HTML; a note where it cannot be read.

    Args:
        path: the file.
        alt: what it shows, plain text.
        link: address that it leads to.
    """
    try:
        uri = _thumbnail(path, path.stat().st_mtime_ns)
    except (OSError, ValueError, Image.DecompressionBombError):
        return '<p class="note">not readable</p>'
    shown = f'<img src="{uri}" alt="{escape(alt)}">'
    return f'<a href="{escape(link)}">{shown}</a>' if link else shown


@lru_cache(maxsize=256)
def _thumbnail(path: Path, _written: int) -> str:
    with Image.open(path) as image:
        return data_uri(image, THUMBNAIL)


def gallery(title: str, shown: Sequence[tuple[str, str]]) -> str:
    """Pictures beside each other under a title, as HTML.

    Args:
        title: plain text.
        shown: HTML of each picture, and its caption in plain text.
    """
    figures = (
        f"<figure>{html}<figcaption>{escape(text)}</figcaption></figure>" for html, text in shown
    )
    return f'<h3>{escape(title)}</h3>\n<div class="previews">{"".join(figures)}</div>'


def growth(row: Row) -> str:
    """The previews of one prompt, as HTML."""
    shown = []
    for step in chosen(list(row.pictures)):
        link = f"{FOLDER}/{name_of(step, row.number)}"
        html = picture(row.pictures[step], f"{row.title} after {step} steps", link)
        shown.append((html, "before" if step == 0 else f"step {step}"))
    return gallery(row.title, shown)
