"""Progress bars with an estimated end, and warnings, on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from edge_dit.text import printable

console = Console(stderr=True)


def warn(text: str) -> None:
    """Print a warning on standard error."""
    console.print(
        printable(f"warning: {text}"), style="yellow", markup=False, highlight=False, soft_wrap=True
    )


class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, steps: float = 1, note: str = "") -> None:
        """Count ``steps`` done and show ``note`` (a loss, a file)."""
        ...


@contextmanager
def bar(title: str, total: int, done: int = 0) -> Iterator[Advance]:
    """A bar of ``total`` steps, ``done`` of them done already; yields what moves it on.

    Without a terminal one line is printed at the end instead.
    """
    if not console.is_terminal:
        notes = [""]

        def count(steps: float = 1, note: str = "") -> None:
            notes[0] = note or notes[0]

        yield count
        console.print(printable(f"{title}: {total} done {notes[0]}").rstrip(), highlight=False)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, completed=done, note="")

        def advance(steps: float = 1, note: str = "") -> None:
            progress.update(task, advance=steps, note=note)

        yield advance
