"""The exported folder and its manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from edge_dit.errors import BadInput

SCHEMA = 1
MANIFEST = "manifest.json"
ADAPTER = "adapter.safetensors"
TARGETS = ("onnx", "ort-training", "executorch")
WEIGHTS = ("float32", "float16", "int8")
"""How the onnx target can store frozen matrices, see `edge_dit.quantize`."""


class TensorSpec(BaseModel):
    """One tensor that crosses the border of an exported graph.

    ``role`` is "batch" (an input that comes from the bank), "lora" (an input or parameter that
    trains) or "output". The order in the manifest is the order of the graphs' arguments.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    role: Literal["batch", "lora", "output"]


class FileSpec(BaseModel):
    """A file of the bundle: path relative to it, size and SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    bytes: int
    sha256: str


class Optimizer(BaseModel):
    """`edge_dit.adamw.AdamW` as stored."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_grad_norm: float


class Manifest(BaseModel):
    """What a bundle says of itself.

    Attributes:
        family: DiT family ("sana").
        plan: the plan it was exported for, as stored in plan.json.
        plan_hash: identifies plan and model weights; a bank carries the same (see `edge_dit.plan`).
        tensors: every tensor crossing the graphs' borders, in argument order.
        optimizer: AdamW's hyper-parameters; ``lr`` is the default of the exported input.
        targets: facts of each exported target (opset, IR, file names).
        tools: versions of the packages that wrote the bundle.
        files: all other files of the folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: int = SCHEMA
    family: str
    plan: dict[str, Any]
    plan_hash: str
    tensors: list[TensorSpec]
    optimizer: Optimizer
    targets: dict[str, dict[str, Any]]
    tools: dict[str, str]
    files: list[FileSpec]

    def names(self, role: str) -> list[str]:
        """Tensor names of one role, in argument order."""
        return [tensor.name for tensor in self.tensors if tensor.role == role]


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of a bundle folder.

    Raises:
        BadInput: no manifest, not valid, or written by a newer schema.
    """
    path = bundle / MANIFEST
    remedy = "export it again: edge-dit export JOB --plan plan.json -o bundle/"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(
            bundle, found="no manifest.json in it", expected="a bundle folder", remedy=remedy
        ) from None
    except (OSError, ValueError) as error:
        raise BadInput(path, found=f"unreadable ({error})", remedy=remedy) from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > SCHEMA:
        raise BadInput(
            path,
            found=f"schema version {version}",
            expected=f"at most {SCHEMA}",
            remedy="upgrade edge-dit",
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise BadInput(path, found=f"{place}: {first['msg']}", remedy=remedy) from None


def check_has_target(bundle: Path, manifest: Manifest, target: str) -> None:
    """Raise `BadInput` when the bundle lacks ``target``."""
    if target not in manifest.targets:
        raise BadInput(
            bundle,
            found=f"no target {target!r}",
            expected=f"one of {', '.join(manifest.targets)}",
            remedy=f"edge-dit export ... --target {target}",
        )
