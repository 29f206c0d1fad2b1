"""LoRA files that diffusers and PEFT load; neither is needed to write them.

diffusers takes rank and alpha from the header entry ``lora_adapter_metadata``. Without it, an alpha
other than the rank silently loads with the wrong scale (diffusers 0.42, loaders/lora_base.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_dit.errors import BadInput
from edge_dit.store.documents import parse_json, read_whole
from edge_dit.store.files import whole_folder, write_json
from edge_dit.store.tensors import TensorFile, write_tensors

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
PREFIX = "transformer."
"""Prefix of LoRA names in diffusers. Without it nothing loads, and diffusers only warns."""
PEFT_ONLY = ("pixart",)
"""Families whose pipeline has no ``load_lora_weights``: their adapters are PEFT folders."""
Rows = dict[str, tuple[np.ndarray, np.ndarray]]
"""LoRA name -> numbers of some of its rows, int64 [n], and new values for them, float32 [n, k]."""


B_STD = 0.02
"""Standard deviation of a random LoRA B. At the initial B = 0 every gradient of A is zero, so a
comparison of gradients would say nothing."""


def with_random_b(adapter: Mapping[str, np.ndarray], std: float = B_STD) -> dict[str, np.ndarray]:
    """``adapter`` with B drawn from N(0, std^2); the same at every call.

    Args:
        adapter: LoRA tensors by diffusers name, float32.
        std: standard deviation of the new B.
    """
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(0, std, value.shape).astype(np.float32) if ".lora_B." in name else value
        for name, value in adapter.items()
    }


def lora_config(names: list[str], rank: int, alpha: float) -> dict[str, object]:
    """The PEFT LoraConfig of an adapter, with only those keys that every PEFT version knows.

    Args:
        names: LoRA tensor names, "transformer.<module>.lora_A.weight" and so on.
        rank: r.
        alpha: lora_alpha; the scale is alpha / r.
    """
    modules = {name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in names}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }


def header(names: list[str], rank: int, alpha: float) -> dict[str, str]:
    """The safetensors header entries by which diffusers restores rank and alpha."""
    config = {f"{PREFIX}{k}": v for k, v in lora_config(names, rank, alpha).items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True)}


def write_adapter(path: Path, tensors: Mapping[str, np.ndarray], rank: int, alpha: float) -> None:
    """Write one LoRA file in diffusers' format, atomically."""
    write_tensors(path, tensors, header(list(tensors), rank, alpha))


def read_adapter(path: Path) -> tuple[dict[str, np.ndarray], int, float]:
    """Tensors by name, rank and alpha of a file written by `write_adapter`.

    Raises:
        BadInput: missing, damaged, or without the header entry.
    """
    try:
        file = TensorFile(path)
        config = parse_json(file.header.metadata["lora_adapter_metadata"].encode())
        return file.read(), *_scale(config, PREFIX)
    except FileNotFoundError:
        raise BadInput(path, found="no such file", expected="a LoRA file") from None
    except (OSError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise BadInput(path, found=f"not a LoRA file that edge-dit wrote ({error!r})") from None


def read_peft(folder: Path) -> tuple[dict[str, np.ndarray], int, float]:
    """Tensors by name, rank and alpha of a PEFT folder written by `write_adapter_folder`.

    Raises:
        BadInput: missing, damaged, or not LoRA.
    """
    try:
        config = parse_json(read_whole(folder / PEFT_CONFIG))
        return TensorFile(folder / PEFT_FILE).read(), *_scale(config)
    except (OSError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise BadInput(folder, found=f"not a PEFT LoRA folder ({error!r})") from None


def _scale(config: Any, prefix: str = "") -> tuple[int, float]:
    """Rank and alpha of a LoraConfig."""
    rank, alpha = config[f"{prefix}r"], float(config[f"{prefix}lora_alpha"])
    if type(rank) is not int or rank < 1 or not math.isfinite(alpha):
        raise ValueError(f"rank {rank!r:.20}, alpha {alpha}")
    return rank, alpha


def write_adapter_folder(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    rank: int,
    alpha: float,
    base_model: str,
    peft_only: bool = False,
) -> None:
    """Write the folder a user passes to ``pipe.load_lora_weights``, with a PEFT copy in ``peft/``.

    The copy is in a sub-folder, because diffusers picks the wrong file when both are in one folder.

    Args:
        folder: the folder to write; written whole, or not at all.
        tensors: by diffusers name.
        rank: r.
        alpha: lora_alpha.
        base_model: the diffusers folder the adapter is for.
        peft_only: write a plain PEFT folder, for families in `PEFT_ONLY`.
    """
    with whole_folder(folder, PEFT_CONFIG if peft_only else DIFFUSERS_FILE) as building:
        peft = building
        if not peft_only:
            write_adapter(building / DIFFUSERS_FILE, tensors, rank, alpha)
            peft = building / "peft"
        named = {f"base_model.model.{k.removeprefix(PREFIX)}": v for k, v in tensors.items()}
        write_tensors(peft / PEFT_FILE, named, {"format": "pt"})
        config = lora_config(list(tensors), rank, alpha)
        write_json(peft / PEFT_CONFIG, {**config, "base_model_name_or_path": base_model})


def peft_folder(folder: Path) -> Path:
    """The PEFT folder in a folder written by `write_adapter_folder`."""
    return folder if (folder / PEFT_CONFIG).is_file() else folder / "peft"


def loading_hint(folder: Path, peft_only: bool) -> str:
    """The line of Python that puts a written adapter into a pipeline ``pipe``."""
    if peft_only:
        load = f'PeftModel.from_pretrained(pipe.transformer, "{folder}")'
        return f"from peft import PeftModel; pipe.transformer = {load}"
    return f'pipe.load_lora_weights("{folder}")'
