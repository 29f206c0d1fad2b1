"""Where the model comes from: a folder, the hub, a folder of the hub's cache, or a single file.

What a job's [model] says becomes a diffusers folder on this machine.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from edge_dit.errors import BadInput
from edge_dit.models.components import INDEX_FILE
from edge_dit.models.hub import AGAIN, PLACE, download, gaps_of, is_hub_id
from edge_dit.store.remote import path_from

EXPECTED = "a folder, a .safetensors file, or a hub id (org/name)"
BESIDE = "paths are relative to the job file"
OTHER_FORMATS = (".ckpt", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".zip", ".dduf")
"""Files of models that are not read."""
CACHED = "models--"
"""How the hub's cache names the folder of a model: models--org--name."""


@dataclass(frozen=True)
class Located:
    """A model on this machine.

    Attributes:
        folder: in diffusers format.
        name: hub id, or bare name of folder or file: what may stand in files that people share.
        revision: commit, if it is the hub's.
    """

    folder: Path
    name: str
    revision: str | None = None


def settle(text: str, base: Path, place: str = PLACE) -> Path | str:
    """What a path of a job means: an absolute path that exists, or a hub id. Asks no network.

    Args:
        text: folder, file or hub id; "~" is the user's home.
        base: folder that relative paths start from. A path that exists there is no hub id.
        place: for messages.

    Raises:
        BadInput: neither exists nor can be a hub id; or a file in another format.
    """
    path = path_from(base, text)
    try:
        if text.strip() and path.is_dir():
            return path.resolve()
        if path.is_file():
            path = path.parent.resolve() / path.name  # a file of the hub's cache is a link
            return _checked_suffix(path, place)
    except (OSError, ValueError):
        pass  # no path can be so
    if web := re.match(r"(?:https?://)?(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)|hf://(.+)", text):
        raise BadInput(
            place,
            found=f"a web address, {text}",
            expected=EXPECTED,
            remedy=f'path = "{web[1] or web[2]}", and revision = "..." if it is not main',
        )
    if Path(text).suffix.lower() not in (".safetensors", *OTHER_FORMATS) and is_hub_id(text):
        return text
    raise BadInput(
        place,
        found=f"{place}: no folder {path.absolute()}",
        expected=EXPECTED,
        remedy=BESIDE,
    )


def locate(
    path: Path | str,
    revision: str | None = None,
    variant: str | None = None,
    config: Path | str | None = None,
) -> Located:
    """Find a model, download it if it is the hub's, convert it if it is a single file.

    Args:
        path: from `settle`: text is a hub id.
        revision: branch, tag or commit, of the hub or of a folder of its cache.
        variant: which weights to download; folders have what they have.
        config: of a single file, see `edge_dit.models.single_file.convert`.

    Raises:
        BadInput: it cannot be had; see `edge_dit.models.hub.download`.
    """
    if isinstance(path, Path) and path.is_file():
        from edge_dit.models.single_file import convert

        _no_key(path, "a single file", revision=revision, variant=variant)
        return Located(convert(path, config), path.name)
    _no_key(path, "not a single file", config=config)
    if isinstance(path, str):
        folder = download(path, revision, variant)
        found = Located(folder, path, folder.name)
    else:
        found = _folder(path, revision)
    _check_whole(found)
    return found


def _checked_suffix(path: Path, place: str) -> Path:
    if path.suffix.lower() == ".safetensors":
        return path
    raise BadInput(
        place,
        found=f"{path.name}, a file that is not .safetensors",
        expected=EXPECTED,
        remedy="get the model as safetensors in float32, float16 or bfloat16; a folder in "
        "diffusers format is best. Pickles (.ckpt, .bin, .pt) may run code, and .gguf is quantised"
        if path.suffix.lower() in OTHER_FORMATS
        else "give the model's folder",
    )


def _no_key(path: Path | str, what: str, **keys: object) -> None:
    """Refuse keys that mean nothing for this kind of model."""
    for key, value in keys.items():
        if value is not None:
            raise BadInput(
                f"model.{key}", found=f"{value!r}, but {path} is {what}", remedy="remove the key"
            )


def _folder(path: Path, revision: str | None) -> Located:
    """A folder as it is, or the snapshot of a folder of the hub's cache."""
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith(CACHED):
        _no_key(path, "one snapshot already", revision=revision)
        return Located(path, _id_of(path.parent.parent), path.name)
    repo = path.parent if path.name == "snapshots" else path
    if repo.name.startswith(CACHED) and (repo / "snapshots").is_dir():
        folder = _snapshot(repo, revision)
        return Located(folder, _id_of(repo), folder.name)
    _no_key(path, "a folder without revisions", revision=revision)
    if (path / INDEX_FILE).is_file():
        return Located(path, path.name)
    if (path.parent / INDEX_FILE).is_file():
        remedy = f"give the whole pipeline, {path.parent}"
    elif inside := sorted(one.name for one in path.glob(f"{CACHED}*--*")):
        remedy = f"it is a hub cache: give one of {', '.join(inside)} in it, or its hub id"
    elif single := sorted(path.glob("*.safetensors")):
        remedy = f"give a whole pipeline in diffusers format, or the single file {single[0]}"
    else:
        remedy = ""
    if remedy:
        raise BadInput(path, found=f"no {INDEX_FILE} in it", expected=EXPECTED, remedy=remedy)
    return Located(path, path.name)  # `detect` says what is missing


def _id_of(repo: Path) -> str:
    """models--org--name -> org/name; a hub id has no "--" of its own."""
    return "/".join(repo.name.removeprefix(CACHED).split("--"))


def _snapshot(repo: Path, revision: str | None) -> Path:
    """The snapshot that a revision means; else that of main; else the only one."""
    snapshots = repo / "snapshots"
    there = sorted(one.name for one in snapshots.iterdir() if one.is_dir())
    wanted = revision or "main"
    ref = repo / "refs" / wanted
    if ".." not in wanted and ref.is_file():
        commit = ref.read_text(encoding="utf-8", errors="replace").strip()
        if commit in there:
            return snapshots / commit
        raise BadInput(
            ref,
            found=f"names snapshot {commit[:80]!r}, which is not there",
            expected=f"one of {', '.join(there)}" if there else "a snapshot",
            remedy=f"download it again: hf download {_id_of(repo)}",
        )
    if revision is None and len(there) == 1:
        return snapshots / there[0]
    if revision in there:
        return snapshots / revision
    raise BadInput(
        repo,
        found="no snapshot in it"
        if not there
        else f"no revision {revision!r}"
        if revision
        else f"{len(there)} snapshots and no refs/main",
        expected=f"one of {', '.join(there)}" if there else "a downloaded model",
        remedy='set [model] revision = "..."'
        if there
        else f"download it: hf download {_id_of(repo)}",
    )


def _check_whole(found: Located) -> None:
    """Refuse a download that stopped half-way.

    A leftover `*.incomplete` alone proves nothing: a stopped process leaves it for ever.
    """
    folder = found.folder
    for file in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if file.is_symlink() and not file.exists():
            raise BadInput(
                file,
                found=f"a link to {os.readlink(file)}, which is not there",
                expected="a whole download; a copied cache needs its blobs, too",
                remedy=f"copy it with its links followed (cp -rL), or download {found.name} again",
            )
    blobs = folder.parent.parent / "blobs" if found.revision else folder / ".cache" / "huggingface"
    gaps = gaps_of(folder)
    if gaps and any(blobs.rglob("*.incomplete")):
        raise BadInput(
            folder,
            found=f"a download that was stopped: {', '.join(gaps)} missing",
            remedy=f"download it again: {AGAIN}",
        )
