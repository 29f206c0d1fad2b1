"""LoRA files: our own, which hold what is trained, and those that users take away.

Our own are a bundle's initial adapter and a run's last one: B as trained, rank and alpha in the
header where diffusers looks for them. A folder that users take away is in one of the formats of
`adapter_formats`, with alpha / rank in B. Neither diffusers nor PEFT is needed to write them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_dit.contract.adapter_formats import (
    DIFFUSERS,
    METADATA,
    NOTE,
    PEFT,
    PREFIX,
    Format,
    exported,
    exported_header,
    header,
    lora_config,
)
from edge_dit.errors import BadInput
from edge_dit.store.documents import parse_json, read_whole
from edge_dit.store.files import whole_folder, write_json
from edge_dit.store.tensors import TensorFile, write_tensors

PEFT_CONFIG = "adapter_config.json"
PEFT_COPY = "peft"
"""PEFT's folder in a diffusers folder; diffusers picks the wrong file when both are in one."""
Rows = dict[str, tuple[np.ndarray, np.ndarray]]
"""LoRA name -> numbers of some of its rows, int64 [n], and new values for them, float32 [n, k]."""


B_STD = 0.02
"""Standard deviation of a random LoRA B. At the initial B = 0 every gradient of A is zero, so a
comparison of gradients would say nothing."""


def with_random_b(adapter: Mapping[str, np.ndarray], std: float = B_STD) -> dict[str, np.ndarray]:
    """``adapter`` with B drawn from N(0, std^2); the same at every call, whatever the
    order of the tensors.

    Args:
        adapter: LoRA tensors by diffusers name, float32.
        std: standard deviation of the new B.
    """
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(0, std, value.shape).astype(np.float32) if ".lora_B." in name else value
        for name, value in sorted(adapter.items())
    }


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file as a person wants it described.

    Attributes:
        tensors: by the file's own names, float32.
        rank: of the training.
        alpha: of the training; an exported file holds it in B.
        format: its name in `adapter_formats`; "" for a file that was not exported.
    """

    tensors: dict[str, np.ndarray]
    rank: int
    alpha: float
    format: str


def write_adapter(path: Path, tensors: Mapping[str, np.ndarray], rank: int, alpha: float) -> None:
    """Write one of our own LoRA files, atomically: B as trained, alpha in the header."""
    write_tensors(path, tensors, header(tensors, rank, alpha))


def read_adapter(path: Path) -> tuple[dict[str, np.ndarray], int, float]:
    """Tensors by name, rank and alpha of a file written by `write_adapter`.

    Raises:
        BadInput: missing, damaged, or without the header entry.
    """
    try:
        file = TensorFile(path)
        config = parse_json(file.header.metadata[METADATA].encode())
        return file.read(), *_scale(config, f"{PREFIX}r", f"{PREFIX}lora_alpha")
    except FileNotFoundError:
        raise _absent(path) from None
    except _DAMAGE as error:
        raise _foreign(path, error) from None


def read_lora(path: Path) -> LoraFile:
    """Any LoRA file that edge-dit wrote.

    Raises:
        BadInput: missing, damaged, or not written by edge-dit.
    """
    try:
        file = TensorFile(path)
        if NOTE not in file.header.metadata:
            return LoraFile(*read_adapter(path), "")
        note = parse_json(file.header.metadata[NOTE].encode())
        return LoraFile(file.read(), *_scale(note, "rank", "alpha"), str(note["format"]))
    except FileNotFoundError:
        raise _absent(path) from None
    except _DAMAGE as error:
        raise _foreign(path, error) from None


def read_peft(folder: Path) -> LoraFile:
    """The LoRA in a PEFT folder.

    Raises:
        BadInput: missing, damaged, or not LoRA.
    """
    try:
        rank, alpha = _scale(parse_json(read_whole(folder / PEFT_CONFIG)), "r", "lora_alpha")
        file = TensorFile(folder / PEFT.file)
        if NOTE not in file.header.metadata:
            return LoraFile(file.read(), rank, alpha, PEFT.name)
        written = read_lora(folder / PEFT.file)
        if (rank, alpha) != (written.rank, written.rank):
            raise ValueError(f"{PEFT_CONFIG} says rank {rank}, alpha {alpha:g}")
        return written
    except _DAMAGE as error:
        raise BadInput(folder, found=f"not a PEFT LoRA folder ({error!r})") from None


_DAMAGE = (OSError, KeyError, ValueError, TypeError, OverflowError)


def _absent(path: Path) -> BadInput:
    return BadInput(path, found="no such file", expected="a LoRA file")


def _foreign(path: Path, error: Exception) -> BadInput:
    return BadInput(path, found=f"not a LoRA file that edge-dit wrote ({error!r})")


def _scale(config: Any, rank_key: str, alpha_key: str) -> tuple[int, float]:
    """Rank and alpha, which ``config`` has under these keys."""
    rank, alpha = config[rank_key], float(config[alpha_key])
    if type(rank) is not int or rank < 1 or not math.isfinite(alpha):
        raise ValueError(f"rank {rank!r:.20}, alpha {alpha}")
    return rank, alpha


def write_adapter_folder(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    rank: int,
    alpha: float,
    base_model: str,
    form: Format = DIFFUSERS,
) -> None:
    """Write the folder that a user takes away; a diffusers folder has a PEFT copy in ``peft/``.

    Args:
        folder: the folder to write; written whole, or not at all.
        tensors: by diffusers name, float32, as trained.
        rank: r.
        alpha: lora_alpha; the files hold alpha / rank in B.
        base_model: the diffusers folder the adapter is for.
        form: its format, one of the family's.

    Raises:
        BadInput: ``folder`` is something else, or the LoRA cannot be written in this format.
    """
    with whole_folder(folder, form.file) as building:
        places = {building: form}
        if form.name == DIFFUSERS.name:
            places[building / PEFT_COPY] = PEFT
        for place, each in places.items():
            named = exported(each, tensors, rank, alpha)
            write_tensors(place / each.file, named, exported_header(each, tensors, rank, alpha))
            if each.name == PEFT.name:
                config = lora_config(tensors, rank, float(rank))
                write_json(place / PEFT_CONFIG, {**config, "base_model_name_or_path": base_model})


def peft_folder(folder: Path) -> Path:
    """The PEFT folder in a folder of format diffusers or peft."""
    return folder if (folder / PEFT_CONFIG).is_file() else folder / PEFT_COPY


def loading_hint(folder: Path, form: Format) -> str:
    """How to load a written adapter: a line of Python for a pipeline ``pipe``, or words.

    Paths are Python literals, whatever characters they hold.
    """
    return form.load.format(folder=str(folder), file=str(folder / form.file))
