"""LoRA files that diffusers and PEFT load, written without either.

diffusers takes rank and alpha from the header entry ``lora_adapter_metadata``; without it an alpha
other than the rank loads with the wrong scale, silently (diffusers 0.42, loaders/lora_base.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from edge_dit.errors import BadInput
from edge_dit.files import whole_folder, write_json, write_tensors

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
"""diffusers' prefix of the transformer's LoRA; without it nothing loads, with a mere warning."""


def lora_config(names: list[str], rank: int, alpha: float) -> dict[str, object]:
    """The PEFT LoraConfig of an adapter, its essential keys only: every PEFT version knows them.

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
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(metadata["lora_adapter_metadata"])
        return tensors, int(config[f"{PREFIX}r"]), float(config[f"{PREFIX}lora_alpha"])
    except FileNotFoundError:
        raise BadInput(path, found="no such file", expected="a LoRA file") from None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise BadInput(path, found=f"not a LoRA file of ours ({error!r})") from None


def write_adapter_folder(
    folder: Path, tensors: Mapping[str, np.ndarray], rank: int, alpha: float, base_model: str
) -> None:
    """The folder a user passes to ``pipe.load_lora_weights``, with a PEFT copy in ``peft/``.

    The copy lies in a sub-folder because diffusers picks the wrong file when both lie together.
    """
    with whole_folder(folder, DIFFUSERS_FILE) as building:
        write_adapter(building / DIFFUSERS_FILE, tensors, rank, alpha)
        peft = {
            f"base_model.model.{name.removeprefix(PREFIX)}": value
            for name, value in tensors.items()
        }
        write_tensors(building / "peft" / "adapter_model.safetensors", peft, {"format": "pt"})
        config = lora_config(list(tensors), rank, alpha)
        write_json(
            building / "peft" / "adapter_config.json",
            {**config, "base_model_name_or_path": base_model},
        )
