"""Write files and folders whole or not at all; open files without trust."""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import lock_descriptor
from platformdirs import user_cache_path

from edge_dit.errors import BadInput
from edge_dit.store.locks import locked

StrPath = str | os.PathLike[str]
"""A path as users of the API may give it."""
REMEDIES = {
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some of your quota, then run the same command again",
    errno.EFBIG: "choose an -o on a file system that takes larger files",
    errno.EIO: "check the device, or choose an -o on another one",
}
"""Error number -> what a user can do when a write fails; `cannot_write` has the default."""
REFUSALS = {*REMEDIES, errno.EACCES, errno.EPERM, errno.EROFS}
STALE = 60
"""Age in seconds from which a temporary file may be left over from a killed process."""


def cannot_write(path: Path, error: OSError) -> BadInput:
    """The error for a file or folder that the system does not let us write."""
    return BadInput(
        path,
        found=f"cannot be written ({error.strerror or error})",
        remedy=REMEDIES.get(error.errno or 0, "make the folder writable, or choose another -o"),
    )


def write_atomic(path: Path, *parts: bytes | memoryview | str) -> None:
    """Write ``path``: readers see its old content or its new one, never a part, also after a crash.

    Args:
        path: the file; its folder is made if needed.
        parts: the new content, one part after the other; text is written as UTF-8.

    Raises:
        BadInput: the system refuses (full, read-only, not permitted); the old content stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                lock_descriptor(handle, blocking=False)  # tells `_sweep` that its writer lives
                for part in parts:
                    file.write(part.encode() if isinstance(part, str) else part)
                file.flush()
                os.fsync(handle)
                if os.name == "posix":
                    os.chmod(temporary, 0o644)
                    os.replace(temporary, path)
            if os.name != "posix":  # where an open file cannot be renamed
                os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise cannot_write(path, error) from error


def _sweep(path: Path) -> None:
    """Remove temporary files of ``path`` whose writers were killed."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime < STALE:
                continue
            descriptor = os.open(left, os.O_RDWR)
            try:
                dead = lock_descriptor(descriptor, blocking=False)
            finally:
                os.close(descriptor)
            if dead:
                left.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable; folders cannot be synced on Windows."""
    if os.name == "posix":
        _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of ``value`` as indented JSON."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def whole_folder(target: Path, marker: str) -> Iterator[Path]:
    """Build a folder next to ``target``; rename it to ``target`` if the block ends without error.

    Args:
        target: the folder to make. An existing folder is replaced if it is empty, or holds
            ``marker`` and so was made by the same command.
        marker: name of a file that only folders made by this command hold.

    Raises:
        BadInput: ``target`` is something else, which we must not delete; another process is making
            it; or the system refuses to write.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent / f".{target.name}.lock", target):
            _recover(target)
            if target.exists() and not (
                target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))
            ):
                raise BadInput(
                    target,
                    found="already there, and not something this command made",
                    expected=f"a new or empty folder, or one with {marker} in it",
                    remedy="choose another -o, or remove it yourself",
                )
            building = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.new."))
            building.chmod(0o755)
            try:
                yield building
                _put_in_place(building, target)
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                raise
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise cannot_write(target, error) from error


def _put_in_place(building: Path, target: Path) -> None:
    """Rename ``building`` to ``target`` once it is durable on disk, then delete the old folder."""
    if os.name == "posix":
        for path in [*building.rglob("*"), building]:
            _sync(path)
    if target.exists():
        os.replace(target, target.parent / f".{target.name}.old")
    os.replace(building, target)
    sync_folder(target.parent)
    shutil.rmtree(target.parent / f".{target.name}.old", ignore_errors=True)


def _recover(target: Path) -> None:
    """Clean up after a process killed in `whole_folder`; the lock says that none is running."""
    old = target.parent / f".{target.name}.old"
    if old.exists() and not target.exists():
        os.replace(old, target)  # it died between its two renames
    for left in [old, *target.parent.glob(f".{glob.escape(target.name)}.new.*")]:
        shutil.rmtree(left, ignore_errors=True)


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file for reading; refuse a pipe or a device, which could block or never end."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("not a regular file")
    return os.fdopen(descriptor, "rb")


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """The user's folder for files that can be made again; it may not exist yet.

    On Linux that is ``${XDG_CACHE_HOME:-~/.cache}/edge-dit``.
    """
    return user_cache_path("edge-dit", appauthor=False)
