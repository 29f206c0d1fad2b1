"""The bundle: an exported folder and its manifest. `open_bundle` opens both at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from edge_dit.contract.adamw import AdamW
from edge_dit.contract.adapter import read_adapter
from edge_dit.contract.names import RelativePath
from edge_dit.contract.targets import TARGETS, WIDE, Facts, stored_as
from edge_dit.errors import BadInput
from edge_dit.store.documents import read_document, validated, write_document
from edge_dit.store.files import sha256

SCHEMA = 2
"""2: blocks that run without training, the loop's parts, weights in several files. Bundles of 1 are
read; who reads only those would leave such blocks out, and must refuse them."""
MANIFEST = "manifest.json"
ADAPTER = "adapter.safetensors"
REMEDY = "export it again: edge-dit export JOB --plan plan.json -o bundle/"
Natural = Annotated[int, Field(ge=0, lt=2**48)]
Size = Annotated[int, Field(ge=0, lt=2**31)]


class TensorSpec(BaseModel):
    """One input or output of the exported graphs.

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
    path: RelativePath
    bytes: Natural
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """The content of manifest.json.

    Attributes:
        family: DiT family ("sana").
        plan: the plan it was exported for (`edge_dit.planning.plan.Plan.shared`).
        plan_hash: identifies plan and model weights; the bank has the same one (see
            `edge_dit.planning.plan.Plan.identity`).
        tensors: every input and output of the graphs, in argument order.
        optimizer: AdamW's hyper-parameters; ``lr`` is the default of the exported input.
        targets: by name, the facts of each exported target (`edge_dit.contract.targets.Facts`).
        tools: versions of the packages that wrote the bundle.
        version: of the bundle, from 1: its maker counts up, and devices may refuse older ones.
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
    version: Annotated[int, Field(ge=1, lt=2**31)] = 1

    @model_validator(mode="after")
    def _facts_are_whole(self) -> Manifest:
        for target, facts in self.targets.items():
            # A target of a newer edge-dit is no fault: nobody here opens it.
            if target in TARGETS and not TARGETS[target].facts.model_validate(facts).layouts():
                raise ValueError(f"no train step of {target}")
        return self

    def names(self, role: str) -> list[str]:
        """Tensor names of one role, in argument order."""
        return [tensor.name for tensor in self.tensors if tensor.role == role]

    def shapes(self, role: str) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of one role by name, in argument order."""
        return {tensor.name: tensor.shape for tensor in self.tensors if tensor.role == role}


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Its manifest is valid; its other files are not checked yet
    (`edge_dit.contract.integrity` checks them).

    Attributes:
        folder: the bundle's folder.
        manifest: the content of its manifest.json.
    """

    folder: Path
    manifest: Manifest

    def file(self, target: str, name: str) -> Path:
        """Path of a target's file."""
        return self.folder / target / name

    @cached_property
    def manifest_sha256(self) -> str:
        """SHA-256 of manifest.json, which lists the SHA-256 of every other file."""
        return sha256(self.folder / MANIFEST)

    def facts(self, target: str) -> Facts:
        """A target's entry in the manifest, in the class that its `Target.facts` names.

        Raises:
            BadInput: the bundle lacks the target, or only a newer edge-dit knows it.
        """
        if target not in self.manifest.targets or target not in TARGETS:
            raise BadInput(
                self.folder,
                found=f"no target {target!r}",
                expected=f"one of {', '.join(self.manifest.targets)}",
                remedy=f"edge-dit export ... --target {target}",
            )
        return TARGETS[target].facts.model_validate(self.manifest.targets[target])

    def layouts(self, target: str) -> list[str]:
        """The exported layouts of a target, the default first.

        Raises:
            BadInput: as `facts`.
        """
        return self.facts(target).layouts()

    def layout(self, target: str, asked: str | None = None) -> str:
        """The layout ``asked`` for, by default the target's first.

        Raises:
            BadInput: the bundle lacks the target or the layout.
        """
        layouts = self.layouts(target)
        if asked not in (None, *layouts):
            raise BadInput(
                self.folder,
                found=f"no layout {asked!r} of target {target}",
                expected=" or ".join(layouts),
                remedy="name another, or export with other [export] weights or recompute",
            )
        return asked or layouts[0]

    def titled(self, target: str, layout: str) -> str:
        """A target and layout as a certificate lists them: "onnx", "onnx (streamed)"."""
        return target if layout == self.layouts(target)[0] else f"{target} ({layout})"

    def dtype(self, target: str) -> str:
        """How a target stores frozen matrices: "float32", "float16", "int8" or "int4"."""
        return str(getattr(self.facts(target), "weights", WIDE))

    def compute(self, target: str) -> str:
        """How a target computes products with frozen matrices: "float32", "int8" or
        "int8-rotated".
        """
        return str(getattr(self.facts(target), "compute", WIDE))

    def stored(self, target: str) -> str:
        """See `edge_dit.contract.targets.stored_as`."""
        return stored_as(self.dtype(target), self.compute(target))

    def adapter(self) -> dict[str, np.ndarray]:
        """The LoRA tensors that training starts from, by diffusers name.

        Raises:
            BadInput: missing or damaged.
        """
        return read_adapter(self.folder / ADAPTER)[0]


def open_bundle(folder: Path) -> Bundle:
    """Open a bundle folder.

    Raises:
        BadInput: the manifest is missing, damaged, not valid, or of a newer schema.
    """
    path = folder / MANIFEST
    raw = read_document(path, "a bundle folder", REMEDY, SCHEMA)
    return Bundle(folder, validated(path, TypeAdapter(Manifest), raw, REMEDY))


def write_manifest(folder: Path, manifest: Manifest) -> Bundle:
    """Write manifest.json into a bundle folder; the bundle, opened."""
    write_document(folder / MANIFEST, manifest.model_dump(mode="json"))
    return Bundle(folder, manifest)
