"""Checks that a bundle's files are those of its manifest, and that none leads out of the bundle.

Hashes of files are remembered in the user's cache folder, and used again while size, times and
inode of the file stay the same. They are not kept in the bundle, because a forged bundle could
bring forged hashes.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from edge_dit.contract.bundle import ADAPTER, Bundle
from edge_dit.contract.names import is_plain_name
from edge_dit.contract.signature import check_trusted
from edge_dit.errors import BadInput, raise_any
from edge_dit.store.files import sha256
from edge_dit.store.onnx_external import external_locations
from edge_dit.store.remembered import SETTLED, Remembered

REMEDY = "copy the bundle again, or export it again"


def check_bundle(bundle: Bundle, target: str, verify_hashes: bool = False) -> None:
    """Raise `BadInput` unless all files that ``target`` loads are in the bundle and as exported,
    and this device's policy, if it has one, accepts the bundle.

    Args:
        bundle: opened.
        target: one of its targets.
        verify_hashes: hash every file, even if its hash is remembered.
    """
    check_trusted(bundle)
    check_confined(bundle, target)
    raise_any(bundle.folder, content_faults(bundle, target, verify_hashes))


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
    hashes = Remembered("hashes.json", use=not verify_hashes, settled=SETTLED)
    faults = []
    for name in sorted(there.keys() | listed.keys()):
        if name not in listed:
            fault = BadInput(there[name], found="not in the manifest", remedy=REMEDY)
        elif name not in there:
            fault = BadInput(folder / name, found="missing", expected="a file", remedy=REMEDY)
        elif (size := there[name].stat().st_size) != listed[name].bytes:
            expected = f"{listed[name].bytes} bytes"
            fault = BadInput(there[name], found=f"{size} bytes", expected=expected, remedy=REMEDY)
        elif hashes.of(there[name], partial(sha256, there[name])) != listed[name].sha256:
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
