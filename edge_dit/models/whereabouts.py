"""Where models lie on this machine. Files that people share name a model, and hold no path."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from edge_dit.errors import BadInput
from edge_dit.store.documents import parse_json, read_whole
from edge_dit.store.files import cache_folder, write_json

KEPT = 8
"""Most folders kept of one model."""
_NOTED: dict[str, list[str]] = {}
"""Hash -> folders, of this process: enough where the user's cache cannot be written."""


def remember(folder: Path, model_hash: str) -> None:
    """Note that the model of a hash lies in a folder."""
    here, known = str(folder.absolute()), _folders(model_hash)
    if known[:1] != [here]:
        _NOTED[model_hash] = [here, *(other for other in known if other != here)][:KEPT]
        with suppress(BadInput):
            write_json(_file(model_hash), _NOTED[model_hash])


def known_folders(name: str, model_hash: str) -> list[Path]:
    """The folders noted for a hash that are still there, the last one first. Whether they still
    hold that model is not checked.

    Args:
        name: of the model, for the message.
        model_hash: `edge_dit.models.model.Model.hash`.

    Raises:
        BadInput: none was noted, or all are gone.
    """
    known = _folders(model_hash)
    if there := [folder for folder in map(Path, known) if folder.is_dir()]:
        return there
    raise BadInput(
        f"model {name}",
        found=f"no longer in {known[0]}" if known else "not known on this machine",
        expected=f"the folder of the model with hash {model_hash[:12]}",
        remedy="name its folder (edge-dit verify ... --model FOLDER), or plan again",
    )


def _folders(model_hash: str) -> list[str]:
    """The folders noted for a hash, the last one first."""
    stored = None
    with suppress(OSError, ValueError):
        stored = parse_json(read_whole(_file(model_hash)))
    noted = _NOTED.get(model_hash, [])
    kept = (
        [folder for folder in stored if isinstance(folder, str)] if isinstance(stored, list) else []
    )
    return [*noted, *(folder for folder in kept if folder not in noted)]


def _file(model_hash: str) -> Path:
    return cache_folder() / "models" / f"{model_hash}.json"
