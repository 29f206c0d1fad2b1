"""Checks that a bundle's files are those of its manifest, and that none leads out of the bundle.

Hashes of files are remembered in the user's cache folder, and used again while size, times and
inode of the file stay the same. They are not kept in the bundle, because a forged bundle could
bring forged hashes.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from edge_dit.contract.bundle import ADAPTER, Bundle
from edge_dit.contract.names import is_plain_name
from edge_dit.errors import BadInput, ManyFaults
from edge_dit.store.documents import parse_json, read_whole
from edge_dit.store.files import cache_folder, sha256, write_json
from edge_dit.store.onnx_external import external_locations

REMEDY = "copy the bundle again, or export it again"
REMEMBERED = 1000
"""Most files in the cache; the oldest entries are dropped."""
SETTLED = 2
"""Seconds a file must be unchanged before its hash is remembered: file times are coarse."""


def check_bundle(bundle: Bundle, target: str, verify_hashes: bool = False) -> None:
    """Raise `BadInput` unless all files that ``target`` loads are in the bundle and as exported.

    Args:
        bundle: opened.
        target: one of its targets.
        verify_hashes: hash every file, even if its hash is remembered.
    """
    check_confined(bundle, target)
    faults = content_faults(bundle, target, verify_hashes)
    if faults:
        raise faults[0] if len(faults) == 1 else ManyFaults(bundle.folder, faults)


def check_confined(bundle: Bundle, target: str) -> None:
    """Raise `BadInput` if a file that ``target`` loads, or one that its graphs refer to, is not a
    plain file in the bundle.
    """
    for path in _files(bundle.folder, target):
        inside = path.resolve().is_relative_to(bundle.folder.resolve())
        if not inside or not path.is_file():
            raise BadInput(
                path,
                found="not a file" if inside else "leads out of the bundle",
                expected="files within the bundle",
                remedy="copy the files themselves into the bundle (cp -RL)",
            )
        if path.suffix == ".onnx":
            _check_external(path)


def _check_external(path: Path) -> None:
    try:
        wrong = [name for name in external_locations(path.read_bytes()) if not is_plain_name(name)]
    except (OSError, ValueError) as error:
        raise BadInput(path, found=f"not an ONNX file ({error})", remedy=REMEDY) from None
    if wrong:
        raise BadInput(
            path,
            found=f"its weights lie in {sorted(wrong)[0]!r:.80}",
            expected="names of files in the same folder",
            remedy="do not use this bundle; export one from the model",
        )


def content_faults(bundle: Bundle, target: str, verify_hashes: bool = False) -> list[BadInput]:
    """One fault for every file of ``target`` that is missing, changed or not in the manifest.

    Args:
        bundle: opened.
        target: one of its targets.
        verify_hashes: hash every file, even if its hash is remembered.
    """
    folder = bundle.folder
    there = {path.relative_to(folder).as_posix(): path for path in _files(folder, target)}
    listed = {file.path: file for file in bundle.manifest.files if _belongs(file.path, target)}
    hashes = _HashCache(use=not verify_hashes)
    faults = []
    for name in sorted(there.keys() | listed.keys()):
        if name not in listed:
            fault = BadInput(there[name], found="not in the manifest", remedy=REMEDY)
        elif name not in there:
            fault = BadInput(folder / name, found="missing", expected="a file", remedy=REMEDY)
        elif (size := there[name].stat().st_size) != listed[name].bytes:
            expected = f"{listed[name].bytes} bytes"
            fault = BadInput(there[name], found=f"{size} bytes", expected=expected, remedy=REMEDY)
        elif hashes.sha256(there[name]) != listed[name].sha256:
            expected = f"SHA-256 {listed[name].sha256[:16]}..., as the manifest says"
            found = "damaged or replaced"
            fault = BadInput(there[name], found=found, expected=expected, remedy=REMEDY)
        else:
            continue
        faults.append(fault)
    hashes.save()
    return faults


def _files(folder: Path, target: str) -> list[Path]:
    """Every file that a session of ``target`` may read: not the hidden ones."""
    inner = (p for p in (folder / target).rglob("*") if p.is_symlink() or not p.is_dir())
    return [folder / ADAPTER, *sorted(path for path in inner if path.name[0] != ".")]


def _belongs(name: str, target: str) -> bool:
    return name == ADAPTER or name.startswith(f"{target}/")


class _HashCache:
    """SHA-256 of files, remembered while size, times and inode of the file stay the same.

    Args:
        use: whether to use remembered hashes; new ones are remembered in any case.
    """

    def __init__(self, use: bool) -> None:
        self._known: dict[str, Any] = {}
        self._new: dict[str, list[Any]] = {}
        with suppress(OSError, ValueError, TypeError):
            self._known = dict(parse_json(read_whole(_cache_file()))) if use else {}

    def sha256(self, path: Path) -> str:
        """SHA-256 of a file's bytes, hexadecimal."""
        status = path.stat()
        times = [status.st_mtime_ns, status.st_ctime_ns]
        mark = [status.st_size, *times, status.st_ino, status.st_dev]
        known = self._known.get(str(path.resolve()))
        if isinstance(known, list) and known[:-1] == mark:
            return str(known[-1])
        digest = sha256(path)
        if time.time() - max(times) / 1e9 > SETTLED:
            self._new[str(path.resolve())] = [*mark, digest]
        return digest

    def save(self) -> None:
        """Write the new hashes; if that fails, the files are hashed again next time."""
        if self._new:
            kept = {name: mark for name, mark in self._known.items() if name not in self._new}
            every = [*kept.items(), *self._new.items()]
            with suppress(BadInput):
                write_json(_cache_file(), dict(every[-REMEMBERED:]))


def _cache_file() -> Path:
    return cache_folder() / "hashes.json"
