"""What was computed from a file, remembered in the user's cache folder while the file is unchanged.

Reading all bytes of a model or a bundle takes longer than looking at size, times and inode.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from edge_dit.errors import BadInput
from edge_dit.store.documents import parse_json, read_whole
from edge_dit.store.files import cache_folder, write_json

LIMIT = 1000
"""Most files in a cache; the oldest entries are dropped."""
SETTLED = 2
"""Seconds after which a file's times tell a change: they are coarse."""


class Remembered:
    """Values of files, remembered while size, times and inode of the file stay the same.

    Args:
        name: of the file in the cache folder.
        use: whether to use remembered values; new ones are remembered in any case.
        settled: seconds that a file must be unchanged before anything is remembered of it.
    """

    def __init__(self, name: str, use: bool = True, settled: float = SETTLED) -> None:
        self._name, self._settled = name, settled
        self._known: dict[str, Any] = {}
        self._new: dict[str, list[Any]] = {}
        with suppress(OSError, ValueError, TypeError):
            self._known = dict(parse_json(read_whole(self._file))) if use else {}

    @property
    def _file(self) -> Path:
        return cache_folder() / self._name

    def of(self, path: Path, compute: Callable[[], Any]) -> Any:
        """The value of a file: what ``compute`` returned when the file was as it is now.

        Args:
            path: the file.
            compute: its value, as JSON holds it; the file is read here.
        """
        status = path.stat()
        times = [status.st_mtime_ns, status.st_ctime_ns]
        mark = [status.st_size, *times, status.st_ino, status.st_dev]
        key = str(path.resolve())
        known = self._new.get(key) or self._known.get(key)
        if isinstance(known, list) and known[:-1] == mark:
            return known[-1]
        value = compute()
        if time.time() - max(times) / 1e9 > self._settled:
            self._new[key] = [*mark, value]
        return value

    def save(self) -> None:
        """Write the new values; if that fails, the files are read again next time."""
        if self._new:
            kept = {name: mark for name, mark in self._known.items() if name not in self._new}
            every = [*kept.items(), *self._new.items()]
            with suppress(BadInput):
                write_json(self._file, dict(every[-LIMIT:]))
