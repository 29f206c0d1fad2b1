"""The exported folder and its manifest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from edge_dit.contract.adamw import AdamW
from edge_dit.errors import BadInput
from edge_dit.store.documents import read_document, validated, write_document

SCHEMA = 1
MANIFEST = "manifest.json"
ADAPTER = "adapter.safetensors"
TARGETS = ("onnx", "ort-training", "executorch")
WEIGHTS = ("float32", "float16", "int8")
"""How the onnx target can store frozen matrices, see `edge_dit.models.quantize`."""
REMEDY = "export it again: edge-dit export JOB --plan plan.json -o bundle/"


def is_plain_name(name: str) -> bool:
    """Whether ``name`` names a file of a folder, on every system: no path, no drive, not hidden."""
    return bool(re.fullmatch(r"[^./\\:\x00-\x1f][^/\\:\x00-\x1f]{0,254}", name))


def _plain(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError("not the plain name of a file")
    return name


def _relative(path: str) -> str:
    for part in path.split("/"):
        _plain(part)
    return path


PlainName = Annotated[str, AfterValidator(_plain)]
Natural = Annotated[int, Field(ge=0, lt=2**48)]
Size = Annotated[int, Field(ge=0, lt=2**31)]


class TensorSpec(BaseModel):
    """One tensor that crosses the border of an exported graph.

    ``role`` is "batch" (an input that comes from the bank), "lora" (an input or parameter that
    trains) or "output". The order in the manifest is the order of the graphs' arguments.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    shape: Annotated[tuple[Size, ...], Field(max_length=8)]
    dtype: str = "float32"
    role: Literal["batch", "lora", "output"]


class FileSpec(BaseModel):
    """A file of the bundle: path relative to it, size and SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: Annotated[str, AfterValidator(_relative)]
    bytes: Natural
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Names(BaseModel):
    """Arguments and results of a graph."""

    inputs: list[str]
    outputs: list[str]


class _Block(BaseModel):
    """A block of the streamed layout, see `edge_dit_export.targets.streamed`."""

    kind: PlainName
    weights: dict[str, str]
    lora: dict[str, str]
    residual: dict[str, str] = {}


class _Streamed(BaseModel):
    graphs: dict[PlainName, _Names]
    blocks: list[_Block]

    @model_validator(mode="after")
    def _blocks_have_graphs(self) -> _Streamed:
        kinds = [(block.kind, way) for block in self.blocks for way in ("forward", "backward")]
        wanted = [*(f"block.{kind}.{way}.onnx" for kind, way in kinds), "head.onnx"]
        missing = [name for name in wanted if name not in self.graphs]
        if missing:
            raise ValueError(f"no graph {missing[0]!r:.80}")
        return self


class _Onnx(BaseModel):
    frozen: PlainName
    weights: Literal["float32", "float16", "int8"] = "float32"
    graphs: dict[PlainName, _Names]
    streamed: _Streamed | None = None


class _OrtTraining(BaseModel):
    frozen: list[str]


class _ExecuTorch(BaseModel):
    """Nothing that a session reads."""


FACTS: dict[str, type[BaseModel]] = {
    "onnx": _Onnx,
    "ort-training": _OrtTraining,
    "executorch": _ExecuTorch,
}
"""What a runtime reads of each target's facts; others may stand beside."""


class Manifest(BaseModel):
    """What a bundle says of itself.

    Attributes:
        family: DiT family ("sana").
        plan: the plan it was exported for, as stored in plan.json.
        plan_hash: identifies plan and model weights; a bank carries the same (see
            `edge_dit.planning.plan`).
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
    optimizer: AdamW
    targets: dict[str, dict[str, Any]]
    tools: dict[str, str]
    files: list[FileSpec]

    @model_validator(mode="after")
    def _facts_are_whole(self) -> Manifest:
        for target, facts in self.targets.items():
            if target in FACTS:  # newer targets do not concern the ones we know
                FACTS[target].model_validate(facts)
        return self

    def names(self, role: str) -> list[str]:
        """Tensor names of one role, in argument order."""
        return [tensor.name for tensor in self.tensors if tensor.role == role]


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    """Write the manifest of a bundle folder."""
    write_document(bundle / MANIFEST, manifest.model_dump(mode="json"))


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of a bundle folder.

    Raises:
        BadInput: no manifest, not valid, or written by a newer schema.
    """
    path = bundle / MANIFEST
    raw = read_document(path, "a bundle folder", REMEDY, SCHEMA)
    return validated(path, TypeAdapter(Manifest), raw, REMEDY)


def check_has_target(bundle: Path, manifest: Manifest, target: str) -> None:
    """Raise `BadInput` when the bundle lacks ``target``."""
    if target not in manifest.targets:
        raise BadInput(
            bundle,
            found=f"no target {target!r}",
            expected=f"one of {', '.join(manifest.targets)}",
            remedy=f"edge-dit export ... --target {target}",
        )
