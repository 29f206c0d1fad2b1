"""Tensors of safetensors files as views of the mapped files.

Pages that are loaded before they are used save time where there is room for them. Where there is
not, they push each other out and are read again and again. So the room for them is looked at
(`edge_dit_runtime.room`), and again every `LOOK` seconds.
"""

from __future__ import annotations

import mmap
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from edge_dit.errors import BadInput
from edge_dit.store.files import open_regular
from edge_dit.store.tensors import read_header
from edge_dit_runtime.room import room

ROOM = 1.5
"""Tensors are loaded before they are used if the room is this many times their size."""
ROOM_AHEAD = 2.5
"""The same, while others of about their size are in use. Measured in 256 MiB with SANA-0.6B's 14
blocks: of 83 MB in float32, with room for half a block, 6.1 s a step without and 8.4 s with; of 21
MB in int8, with room for 1.7 blocks, 2.3 and 1.8 s, and 2.7 s with the next one loaded too."""
LOOK = 0.5
"""Looking at the room takes about a millisecond."""
POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14: map all pages at once instead of one per page fault."""


class MappedTensors:
    """Read-only numpy views by name: the system loads pages when they are read, and may evict them.

    Args:
        paths: safetensors files; no two have a tensor of the same name.

    Raises:
        BadInput: not a readable safetensors file.
    """

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self._files = [_MappedFile(path) for path in paths]
        self._file_of = {name: file for file in self._files for name in file.views}
        self._room: int | None = None
        self._look = 0.0
        self._reader = ThreadPoolExecutor(1, "edge-dit-read-ahead")

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._file_of:
            raise BadInput(
                self._paths[0] if len(self._paths) == 1 else self._paths[0].parent,
                found=f"no tensor {name!r:.80}",
                expected="the weights that the manifest names",
                remedy="export the bundle again",
            )
        return self._file_of[name].views[name]

    def pick(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Those of ``names`` that the files have."""
        return {name: self[name] for name in names if name in self._file_of}

    def fetch(self, names: Iterable[str]) -> None:
        """Load tensors before they are used, where the system can and has room. This saves only
        time.
        """
        self._load(set(names), ROOM)

    def fetch_ahead(self, names: Iterable[str]) -> None:
        """`fetch` in a thread of its own, while something else is computed."""
        self._reader.submit(self._load, set(names), ROOM_AHEAD)

    def _load(self, names: set[str], times: float) -> None:
        now = time.monotonic()
        if now >= self._look:
            self._room, self._look = room(), now + LOOK
        size = sum(self[name].nbytes for name in names)
        if self._room is not None and self._room < times * size:
            return
        for file in self._files:
            file.advise(names & file.views.keys(), POPULATE_READ)

    def release(self, names: Iterable[str] | None = None) -> None:
        """Give pages back to the system; a later use loads them again.

        Args:
            names: of the tensors; default all. A page that another tensor shares goes too.
        """
        given = None if names is None else set(names)
        for file in self._files:
            if given is None:
                file.release()
            else:
                file.advise(given & file.views.keys(), mmap.MADV_DONTNEED)


class _MappedFile:
    """One of the files."""

    def __init__(self, path: Path) -> None:
        try:
            with open_regular(path) as file:
                places = read_header(file).tensors
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            data = np.frombuffer(self._map, np.uint8)
            self._places = {name: (place.begin, place.end) for name, place in places.items()}
            self.views = {
                name: data[place.begin : place.end].view(place.dtype).reshape(place.shape)
                for name, place in places.items()
            }
        except (OSError, ValueError) as error:
            raise BadInput(
                path,
                found=f"not a readable file of weights ({error})",
                remedy="export the bundle again",
            ) from None

    def advise(self, names: Iterable[str], advice: int) -> None:
        """Tell the system what comes of the pages of some tensors, neighbours together."""
        start = end = 0
        for begin, stop in [*sorted(self._places[name] for name in names), (sys.maxsize, 0)]:
            if begin > end + mmap.PAGESIZE:
                if end > start:
                    self._tell(advice, start, end)
                start = begin // mmap.PAGESIZE * mmap.PAGESIZE
            end = max(end, stop)

    def release(self) -> None:
        """Give all pages back to the system."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def _tell(self, advice: int, start: int, end: int) -> None:
        with suppress(OSError, ValueError):
            self._map.madvise(advice, start, end - start)
