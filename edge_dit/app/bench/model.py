"""The model that `edge-dit bench` measures: a public configuration with random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from edge_dit.app.doctor import package_versions
from edge_dit.contract.adamw import AdamW
from edge_dit.errors import BadInput, require
from edge_dit.models.public_configs import PublicConfig, public_config
from edge_dit.planning.plan import SCHEMA, Plan
from edge_dit.store.files import write_atomic, write_json

MODEL = "model"
"""Folder of the model within the work folder."""
SCHEDULERS = {"pixart": "DDPMScheduler"}
"""Class of the scheduler of families that do not learn by flow matching."""
MARKER = ".edge-dit-bench"
"""File that marks a work folder of the bench: such a folder may be emptied."""
VECTOR_STD, MATRIX_STD = 0.1, 0.02
"""Standard deviations of random weights with one axis, and with more."""
SIZES = ("config", "trained", "tokens", "text", "rank")
"""Attributes of a `Case` that models and bundles depend on."""


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        config: name of a public configuration.
        trained: trained blocks in each of the model's containers.
        tokens: image tokens, a square number.
        text: text tokens.
        rank: of the LoRA.
        steps: timed steps.
        full_lora: measure full LoRA at the configuration's full resolution too.
    """

    config: str
    trained: list[int]
    tokens: int
    text: int
    rank: int = 16
    steps: int = 5
    full_lora: bool = True


def blocks_of(words: str) -> list[int]:
    """Blocks of "14" or "4+4", those of each container."""
    return [int(part) for part in words.split("+") if part.isdigit()]


def random_model(case: Case, work: Path) -> Plan:
    """Write a pipeline folder ``work/model`` with random weights, and plan to train all its blocks.

    The model has the blocks that ``case`` trains and no others. A model that an earlier call made
    for the same case with the same package versions stays, and so do the bundles beside it; else
    ``work`` is emptied first.

    Raises:
        BadInput: sizes that do not fit the configuration, or ``work`` holds something else.
    """
    require("torch", "bench")
    from edge_dit.models.families import FAMILIES, family_of

    public = public_config(case.config)
    family = family_of(public.family)
    config = _shortened(public, case, family)
    side = round(case.tokens**0.5)
    if side * side != case.tokens:
        raise BadInput("--tokens", found=str(case.tokens), expected="a square number")
    model = work / MODEL
    made_of = {
        "sizes": {name: value for name, value in asdict(case).items() if name in SIZES},
        "versions": package_versions(),
    }
    if not _holds(model / "case.json", made_of):
        _empty(work)
        write_json(model / "model_index.json", {"_class_name": FAMILIES[public.family][0]})
        kind = SCHEDULERS.get(public.family, "FlowMatchEulerDiscreteScheduler")
        write_json(model / "scheduler" / "scheduler_config.json", {"_class_name": kind})
        write_json(model / "transformer" / "config.json", config)
        random_weights(family, config, model / "transformer")
        write_json(model / "case.json", made_of)  # last: it says that the model is whole
    return Plan(
        schema_version=SCHEMA,
        family=public.family,
        model=model.resolve(),
        model_name=case.config,
        model_hash="random",
        layers=sum(case.trained),
        head_skip=0,
        tail_skip=0,
        s_min=side * public.multiple,
        s_max=side * public.multiple,
        multiple=public.multiple,
        text_tokens=case.text,
        rank=case.rank,
        alpha=float(case.rank),
        lora_targets=list(family.lora_targets),
        optimizer=AdamW(lr=1e-4),
        steps=case.steps,
        draws=1,
        seed=0,
        targets=["onnx"],
    )


def _shortened(public: PublicConfig, case: Case, family: Any) -> dict[str, Any]:
    """The public configuration with as many blocks as ``case`` trains."""
    counts = list(family.containers.values())
    if len(case.trained) != len(counts) or sum(case.trained) < 1:
        raise BadInput(
            "--trained",
            found="+".join(map(str, case.trained)),
            expected=f"a number of blocks for each of {', '.join(family.containers)}",
            remedy="e.g. --trained 4+4 for FLUX, --trained 14 for the others",
        )
    lengths = dict(zip(counts, case.trained, strict=True))
    return {"_class_name": family.transformer, **public.config, **lengths}


def _holds(path: Path, value: Any) -> bool:
    """Whether a JSON file is there and holds ``value``."""
    try:
        return json.loads(path.read_text()) == value
    except (OSError, ValueError):
        return False


def _empty(work: Path) -> None:
    """Make ``work`` an empty folder that `MARKER` marks.

    Raises:
        BadInput: it holds something that the bench did not make.
    """
    ours = (work / MARKER).is_file()
    if work.exists() and not ours and (not work.is_dir() or any(work.iterdir())):
        raise BadInput(
            work,
            found="already there, and not something this command made",
            expected="a new or empty folder, or one of an earlier bench",
            remedy="choose another --work",
        )
    if ours:
        shutil.rmtree(work)
    write_atomic(work / MARKER, "")


def random_weights(family: Any, config: dict[str, Any], folder: Path) -> None:
    """Write random float32 weights as diffusers' shards: a file for each block, one for the rest.

    Args:
        family: of the transformer.
        config: of the transformer.
        folder: the transformer's folder; the index goes into it too.
    """
    import torch

    from edge_dit.models.checkpoint import INDEX, meta_model

    generator = torch.Generator().manual_seed(0)
    state = meta_model(family, config).state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    blocks = family.block_names(config)
    shards: dict[str, list[str]] = {}
    for name in shapes:
        block = next((b for b in blocks if name.startswith(f"{b}.")), "rest")
        shards.setdefault(block, []).append(name)
    file_of = {}
    for number, names in enumerate(shards.values()):
        file = f"diffusion_pytorch_model-{number:05d}.safetensors"
        tensors = {}
        for name in names:
            vector = len(shapes[name]) < 2
            std = VECTOR_STD if vector else MATRIX_STD
            # A norm's weight; not the matrix "norm1.linear.weight", which makes modulations.
            mean = 1.0 if vector and "norm" in name and name.endswith("weight") else 0.0
            value = torch.randn(shapes[name], generator=generator) * std + mean
            tensors[name] = value.numpy()
            file_of[name] = file
        save_file(tensors, folder / file)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": file_of})
