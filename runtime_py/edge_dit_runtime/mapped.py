"""Tensors of a safetensors file as views of the mapped file."""

from __future__ import annotations

import json
import mmap
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from edge_dit.errors import BadInput

DTYPES = {"F32": np.float32, "F16": np.float16, "I8": np.int8}
POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14: map pages at once that would come in one fault at a time."""


class MappedTensors:
    """Read-only numpy views by name: pages come in when read and can be evicted again.

    Args:
        path: a safetensors file of float32, float16 or int8 tensors.

    Raises:
        BadInput: not such a file.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            size = int.from_bytes(self._map[:8], "little")
            header = json.loads(self._map[8 : 8 + size])
            header.pop("__metadata__", None)
            data = np.frombuffer(self._map, np.uint8)[8 + size :]
            self._places = {
                name: [8 + size + offset for offset in entry["data_offsets"]]
                for name, entry in header.items()
            }
            ends = [entry["data_offsets"][1] for entry in header.values()]
            if max(ends, default=0) != len(data):
                raise ValueError(f"{len(data)} bytes of tensors, its header names {max(ends)}")
            self._views = {
                name: data[slice(*entry["data_offsets"])]
                .view(DTYPES[entry["dtype"]])
                .reshape(entry["shape"])
                for name, entry in header.items()
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                path,
                found=f"not a readable file of weights ({error!r})",
                remedy="export the bundle again",
            ) from None

    def __getitem__(self, name: str) -> np.ndarray:
        return self._views[name]

    def pick(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The tensors among ``names``."""
        return {name: self._views[name] for name in names if name in self._views}

    def fetch(self, names: Iterable[str]) -> None:
        """Bring tensors into memory ahead of their use, where the system can; never needed."""
        start = end = 0
        for begin, stop in [*sorted(self._places[name] for name in names), (sys.maxsize, 0)]:
            if begin > end + mmap.PAGESIZE:
                if end > start:
                    self._populate(start, end)
                start = begin // mmap.PAGESIZE * mmap.PAGESIZE
            end = max(end, stop)

    def _populate(self, start: int, end: int) -> None:
        with suppress(OSError, ValueError):
            self._map.madvise(POPULATE_READ, start, end - start)

    def release(self) -> None:
        """Give the pages back to the system; they are read from its cache, or the file, again."""
        self._map.madvise(mmap.MADV_DONTNEED)
