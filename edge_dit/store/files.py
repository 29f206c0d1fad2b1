"""Files that are either whole or absent, and files opened without trust."""

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
"""What a user can do when a write fails; for all else, see `cannot_write`."""
REFUSALS = {*REMEDIES, errno.EACCES, errno.EPERM, errno.EROFS}
STALE = 60
"""Seconds after which a temporary file may be a dead writer's."""


def cannot_write(path: Path, error: OSError) -> BadInput:
    """The error for a file or folder that the system does not let us write."""
    return BadInput(
        path,
        found=f"cannot be written ({error.strerror or error})",
        remedy=REMEDIES.get(error.errno or 0, "make the folder writable, or choose another -o"),
    )


def write_atomic(path: Path, *parts: bytes | memoryview | str) -> None:
    """Write ``path`` so that a reader or a crash sees old content or new, never a part.

    Args:
        path: its folder is made.
        parts: what it is to hold, one after the other.

    Raises:
        BadInput: the system refuses (full, read-only, not permitted); what was there is still.
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
    """Remove what writers of ``path`` left that were killed."""
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
    """Build a folder beside ``target`` and put it in place when the block ends without error.

    Args:
        target: the folder to make. One that is there already is replaced if it holds ``marker``
            (it was made by the same command) or is empty.
        marker: name of the file by which such a folder is known.

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
    """Rename ``building`` to ``target`` once every byte of it is durable; the old one goes last."""
    if os.name == "posix":
        for path in [*building.rglob("*"), building]:
            _sync(path)
    if target.exists():
        os.replace(target, target.parent / f".{target.name}.old")
    os.replace(building, target)
    sync_folder(target.parent)
    shutil.rmtree(target.parent / f".{target.name}.old", ignore_errors=True)


def _recover(target: Path) -> None:
    """Undo what a process left that was killed in `whole_folder`; the lock says that none is."""
    old = target.parent / f".{target.name}.old"
    if old.exists() and not target.exists():
        os.replace(old, target)  # it died between its two renames
    for left in [old, *target.parent.glob(f".{glob.escape(target.name)}.new.*")]:
        shutil.rmtree(left, ignore_errors=True)


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file for reading; a pipe or a device, which could wait or never end, is refused."""
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
    """Where this user's machine keeps what can be made again; it need not be there.

    On Linux that is ``${XDG_CACHE_HOME:-~/.cache}/edge-dit``.
    """
    return user_cache_path("edge-dit", appauthor=False)
