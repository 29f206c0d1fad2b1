"""Shows a run while it trains: its page, steps.csv, and TensorBoard's events.

It takes no part in training: what cannot be written is a warning.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_dit.errors import BadInput
from edge_dit.progress import warn
from edge_dit.store.files import cannot_write, write_atomic
from edge_dit_runtime.page.events import Events, open_events
from edge_dit_runtime.page.run_page import PAGE, run_page
from edge_dit_runtime.step_log import StepLog

if TYPE_CHECKING:
    from edge_dit_runtime.run_folder import Run

FIRST, EVERY = 3.0, 10.0
"""Seconds until the first page, and between two."""
SHARE = 0.01
"""Most of a run's time that writing them may take: slow disks get pages less often."""


class Watch:
    """Writes run.html, steps.csv and event files of a run.

    Args:
        folder: of the run.
        run: what it trains.
        log: its steps, which training adds to.
    """

    def __init__(self, folder: Path, run: Run, log: StepLog) -> None:
        self._folder, self._run, self._log = folder, run, log
        self._begun = len(log)
        self._events: Events | None = None
        self._next, self._warned, self._tried = time.monotonic() + FIRST, False, False

    def look(self) -> None:
        """Write page and events, if it is time to. `close` writes the last ones."""
        if len(self._log) < self._run.steps and time.monotonic() >= self._next:
            self.show()

    def show(self) -> None:
        """Write page and events."""
        started = time.monotonic()
        self._write(self._write_page, trains=True)
        self._write(self._write_events)
        now = time.monotonic()
        self._next = now + max(EVERY, (now - started) / SHARE)

    def keep(self) -> None:
        """Write steps.csv and events before a checkpoint: it must have no step that they lack."""
        if len(self._log) > self._begun:
            self._write(self._log.write_steps, folder=self._folder)
            self._write(self._write_events)

    def close(self) -> None:
        """Write the last page and events, unless no step was done and there is a page."""
        self._write(self._write_events)
        if len(self._log) > self._begun or not (self._folder / PAGE).is_file():
            self._write(self._write_page, trains=False)

    def _write(self, write: Callable[..., None], **options: Any) -> None:
        try:
            write(**options)
        except (BadInput, OSError) as error:
            if not self._warned:
                known = error if isinstance(error, BadInput) else cannot_write(self._folder, error)
                warn(f"what the run shows is not up to date: {known}")
            self._warned = True

    def _write_page(self, trains: bool) -> None:
        write_atomic(self._folder / PAGE, run_page(self._folder, self._run, self._log, trains))

    def _write_events(self) -> None:
        if len(self._log) == self._begun:
            return
        if not self._tried:
            self._tried = True
            self._events = open_events(self._folder, self._begun)
        if self._events is not None:
            events, self._events = self._events, None  # a file that failed is left as it is
            events.write(self._log)
            self._events = events
