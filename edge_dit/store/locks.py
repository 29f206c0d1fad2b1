"""One process at a time: locks that the system lets go of when their process dies."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edge_dit.errors import BadInput


@contextmanager
def locked(path: Path, what: object) -> Iterator[None]:
    """Hold ``path`` as a lock while the block runs; the file is removed behind it.

    Args:
        path: of the lock file, in an existing folder.
        what: what it guards, for the message.

    Raises:
        BadInput: another process, or another thread of this one, holds it.
    """
    descriptor = _hold(path, what)
    try:
        yield
    finally:
        if os.name != "posix":  # where an open file cannot be removed
            os.close(descriptor)
        with suppress(OSError):
            path.unlink()
        if os.name == "posix":
            os.close(descriptor)


def _hold(path: Path, what: object) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not try_lock(descriptor):
            os.close(descriptor)
            raise BadInput(
                what,
                found="in use by another process",
                expected="one process at a time",
                remedy="wait for it or stop it, then run the same command again",
            )
        # The process that held it before may have removed the file we opened.
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock an open file unless someone else has; closing it, or dying, lets go."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
