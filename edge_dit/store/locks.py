"""Lock files, for one process at a time in a folder. The system releases them when it dies.

The lock is filelock's on an open file (flock, or LockFileEx on Windows). Its class `FileLock` is
not used: on Linux and macOS it leaves its file in the folder. We remove the file. A second process
may open it just before that and lock it just after; its lock is then on a removed file. A
`FileLock` that does not wait gives up there; `locked` tries again at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor

from edge_dit.errors import BadInput


@contextmanager
def locked(path: Path, what: object) -> Iterator[None]:
    """Hold ``path`` as a lock while the block runs, then remove the file.

    Args:
        path: the lock file, in an existing folder.
        what: what the lock guards, for the message.

    Raises:
        BadInput: another process, or another thread of this one, holds it.
        OSError: the file cannot be made.
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
    """The descriptor of the lock file, open and locked; closing it releases the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not lock_descriptor(descriptor, blocking=False):
            os.close(descriptor)
            raise BadInput(
                what,
                found="in use by another process",
                expected="one process at a time",
                remedy="wait for it or stop it, then run the same command again",
            )
        # The process that held it before may have removed the file that we opened.
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)
