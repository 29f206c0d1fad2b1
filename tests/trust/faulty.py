"""A disk that fails: stands in for the ``os`` module that `edge_dit.store.files` writes through."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

WRITES = ("fsync", "replace", "chmod", "unlink")
"""Operations on the way to a durable file, beside opening and writing it."""


class Crash(BaseException):
    """The power goes: nothing of ours runs any more."""


class FaultyDisk:
    """``os``, whose operation number ``at`` fails, and with a crash every later one too.

    Args:
        at: which; None for one that never fails, to count them.
        error: a number of `errno`, or None for a crash.
    """

    def __init__(self, at: int | None, error: int | None) -> None:
        self.at, self.error = at, error
        self.count = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._failing(real) if name in WRITES else real

    def _failing(self, real: Any) -> Any:
        def operation(*args: Any, **options: Any) -> Any:
            self.tick()
            return real(*args, **options)

        return operation

    def tick(self) -> None:
        """Count an operation, and fail if it is its turn."""
        number, self.count = self.count, self.count + 1
        if self.at is None or number < self.at:
            return
        if self.error is None:
            raise Crash
        if number == self.at:
            raise OSError(self.error, os.strerror(self.error))

    def fdopen(self, descriptor: int, mode: str) -> Any:
        """An open file whose every write counts; half of a failing one reaches the disk."""
        return _FaultyFile(self, os.fdopen(descriptor, mode, buffering=0))


class _FaultyFile:
    def __init__(self, disk: FaultyDisk, file: Any) -> None:
        self._disk, self._file = disk, file

    def __enter__(self) -> _FaultyFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> None:
        try:
            self._disk.tick()
        except BaseException:
            self._file.write(data[: len(data) // 2])
            raise
        self._file.write(data)


def install(monkeypatch: Any, at: int | None, error: int | None = None) -> FaultyDisk:
    """Let `edge_dit.store.files` write through a faulty disk."""
    disk = FaultyDisk(at, error)
    monkeypatch.setattr("edge_dit.store.files.os", disk)
    return disk


ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS)


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden leftovers aside."""
    paths = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name[0] != ".")
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}
