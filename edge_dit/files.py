"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from edge_dit.errors import BadInput


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write ``path`` so that a reader or a crash sees old content or new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable; folders cannot be synced on Windows."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of ``value`` as indented JSON."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """`write_atomic` of a safetensors file."""
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    write_atomic(path, save(contiguous, dict(metadata) if metadata else None))


@contextlib.contextmanager
def whole_folder(target: Path, marker: str) -> Iterator[Path]:
    """Build a folder beside ``target`` and put it in place when the block ends without error.

    Args:
        target: the folder to make. One that is there already is replaced if it holds ``marker``
            (it was made by the same command) or is empty.
        marker: name of the file by which such a folder is known.

    Raises:
        BadInput: ``target`` is something else, which we must not delete.
    """
    if target.exists() and not (
        target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))
    ):
        raise BadInput(
            target,
            found="already there, and not something this command made",
            expected=f"a new or empty folder, or one with {marker} in it",
            remedy="choose another -o, or remove it yourself",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    building.chmod(0o755)
    try:
        yield building
        old = None
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
            os.replace(target, old)
        os.replace(building, target)
        sync_folder(target.parent)
        if old is not None:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
