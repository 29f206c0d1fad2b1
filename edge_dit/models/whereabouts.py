"""Where models lie on this machine. Files that people share name a model, and hold no path."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from edge_dit.errors import BadInput
from edge_dit.store.documents import read_whole
from edge_dit.store.files import cache_folder, write_atomic

_LAST: dict[str, Path] = {}
"""Hash -> folder, of this process: enough where the user's cache cannot be written."""


def remember(folder: Path, model_hash: str) -> None:
    """Note that the model of a hash lies in a folder; the last folder noted counts."""
    if _LAST.get(model_hash) != folder.absolute():
        _LAST[model_hash] = folder.absolute()
        with suppress(BadInput):
            write_atomic(_file(model_hash), str(folder.absolute()))


def known_folder(name: str, model_hash: str) -> Path:
    """The folder that was last noted for a hash; whether it still holds that model is not checked.

    Args:
        name: of the model, for the message.
        model_hash: `edge_dit.models.model.Model.hash`.

    Raises:
        BadInput: none was noted, or the folder is gone.
    """
    folder = _LAST.get(model_hash)
    if folder is None:
        with suppress(OSError, ValueError):
            folder = Path(read_whole(_file(model_hash)).decode("utf-8"))
    if folder is None or not folder.is_dir():
        raise BadInput(
            f"model {name}",
            found="not known on this machine" if folder is None else f"no longer in {folder}",
            expected=f"the folder of the model with hash {model_hash[:12]}",
            remedy="name its folder (edge-dit verify ... --model FOLDER), or plan again",
        )
    return folder


def _file(model_hash: str) -> Path:
    return cache_folder() / "models" / model_hash
