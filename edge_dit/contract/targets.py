"""The targets, with all that exporter, runtime and footprint must agree on.

Each target has a folder of its own in a bundle. To add one, write its record in `TARGETS`, its
exporter in ``edge_dit_export/targets/<module>.py``, its session in
``edge_dit_runtime/sessions/<module>.py``, and its cost in `edge_dit.budget.footprint`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from edge_dit.contract.graphs import GraphNames, StreamedBlock
from edge_dit.contract.loop import LoopFacts
from edge_dit.contract.names import STORED, TAILS, THROUGH, PlainName, Tail
from edge_dit.errors import BadInput

Dtype = Literal["float32", "float16", "int8", "int4"]
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "int8", "int4")
"""How frozen matrices can be stored. int8 has one float32 scale per output channel; int4, for
blocks' matrices, one per group of inputs (`edge_dit.models.quantize.to_int4`).
"""
WIDE: Literal["float32"] = "float32"
Compute = Literal["float32", "int8", "int8-rotated"]
"""How products with frozen matrices are computed."""
INT8: Literal["int8"] = "int8"
"""In int8 both ways, see `edge_dit.models.int8_products`; frozen matrices are stored as int8."""
INT4: Literal["int4"] = "int4"
"""Two elements of a matrix in a byte; products are computed in float32."""
ROTATED: Literal["int8-rotated"] = "int8-rotated"
"""The same, with matrices and their inputs rotated first, see `edge_dit.models.rotation`."""


def stored_as(dtype: str, compute: str) -> str:
    """How blocks' frozen matrices are stored: as ``dtype``, or as int8 after they were rotated."""
    return ROTATED if compute == ROTATED else dtype


FROZEN = "frozen.safetensors"
"""File of a target's frozen weights, each once; what does not fit into it goes to further files."""
FILE_BYTES = 512 * 10**6
"""Most bytes of a file of frozen weights: an app store's packs may be that large. A tensor that is
larger has a file of its own."""


def frozen_file(number: int) -> str:
    """Name of a target's file of frozen weights, from 0: "frozen.safetensors",
    "frozen-1.safetensors".
    """
    return f"frozen-{number}.safetensors" if number else FROZEN


PIECE = 32 * 2**20
"""Most bytes of float32 that a stored weight is widened to at once, see
`edge_dit_export.passes_onnx.weights_in_fewer_bytes`.
"""

# ---------------------------------------------------------------- files of the onnx target

FUSED, RECOMPUTE, STREAMED = "fused", "recompute", "streamed"
STEP_FILES = {FUSED: "train_step.onnx", RECOMPUTE: "train_step.recompute.onnx"}
"""Layout with one graph for the whole step -> file of that graph."""
HEAD, OPTIMIZER, SAMPLER = "head.onnx", "optimizer.onnx", "patch_sampler.onnx"
DIRECTIONS = ("forward", "backward")


def block_file(kind: str, direction: str) -> str:
    """File of a block's graph in the streamed layout, for one of `DIRECTIONS`."""
    return f"block.{kind}.{direction}.onnx"


# ---------------------------------------------------------------- files of the others

TRAINING_MODEL, EVAL_MODEL = "training_model.onnx", "eval_model.onnx"
OPTIMIZER_MODEL, CHECKPOINT = "optimizer_model.onnx", "checkpoint"
"""Files of ort-training, as onnxruntime's generate_artifacts names them."""
TRAIN_PROGRAM, OPTIMIZER_PROGRAM, SAMPLER_PROGRAM = (
    "train.pte",
    "optimizer.pte",
    "patch_sampler.pte",
)
"""Files of executorch."""


# ---------------------------------------------------------------- a target's entry in the manifest


class Facts(BaseModel):
    """The part of a target's entry that a session reads; the entry may have more keys.

    Attributes:
        memory: layout -> bytes of anonymous memory that a training process is predicted to take at
            its peak; bundles of earlier versions have none.
    """

    memory: dict[str, Annotated[int, Field(ge=0)]] = {}

    def layouts(self) -> list[str]:
        """The exported layouts, the default first."""
        return [FUSED]


class StreamedFacts(BaseModel):
    """The streamed layout.

    Attributes:
        graphs: by file.
        blocks: those that a gradient goes back through, in order. Blocks of the tail, where the
            gradient goes through it, come last; they have no LoRA.
        forward_only: the tail's blocks where they run and their residual counts as a constant. The
            head's gradient is then that of the state before them.
    """

    graphs: dict[PlainName, GraphNames]
    blocks: list[StreamedBlock]
    forward_only: list[StreamedBlock] = []

    @model_validator(mode="after")
    def _blocks_have_graphs(self) -> StreamedFacts:
        wanted = [block_file(b.kind, d) for b in self.blocks for d in DIRECTIONS]
        wanted += [block_file(b.kind, DIRECTIONS[0]) for b in self.forward_only]
        missing = [name for name in [*wanted, HEAD] if name not in self.graphs]
        if missing:
            raise ValueError(f"no graph {missing[0]!r:.80}")
        return self


def _listed(value: Any) -> Any:
    """Bundles of earlier versions name one file, not a list."""
    return [value] if isinstance(value, str) else value


class OnnxFacts(Facts):
    """The onnx target.

    Attributes:
        frozen: files of the frozen weights.
        weights: how those files store frozen matrices.
        compute: how products with the blocks' frozen matrices are computed in a training step.
        graphs: names of each graph's inputs and outputs, by file.
        streamed: the streamed layout.
        loop: what makes draws of pictures, and paints.
    """

    frozen: Annotated[list[PlainName], BeforeValidator(_listed), Field(min_length=1)]
    weights: Dtype = WIDE
    compute: Compute = WIDE
    graphs: dict[PlainName, GraphNames]
    streamed: StreamedFacts | None = None
    loop: LoopFacts | None = None

    def layouts(self) -> list[str]:
        """Layouts of `STEP_FILES` that have a graph, then "streamed" if it was exported."""
        whole = [layout for layout, file in STEP_FILES.items() if file in self.graphs]
        return whole + ([STREAMED] if self.streamed else [])


class ExecuTorchFacts(Facts):
    """The executorch target.

    Attributes:
        weights: how its program stores frozen matrices.
        compute: how products with the blocks' frozen matrices are computed in a training step.
    """

    weights: Dtype = WIDE
    compute: Compute = WIDE


class OrtTrainingFacts(Facts):
    """The ort-training target.

    Attributes:
        frozen: inputs of the graph after the batch, in order; each is a key in ``files``.
        files: of the frozen weights.
    """

    frozen: list[str]
    files: Annotated[list[PlainName], Field(min_length=1)] = [FROZEN]


# ---------------------------------------------------------------- the records

_FLOAT32 = {
    "loss": 1e-4,
    "gradients": 1e-4,
    "inputs": 1e-4,
    "trajectory": 1e-4,
    "adapter": 1e-3,
    "optimizer": 1e-4,
    "patch": 1e-5,
    "prompts": 1e-5,
    "collect": 1e-4,
    "paint": 1e-4,
}
_EXECUTORCH = {**dict.fromkeys(_FLOAT32, 1e-3), "patch": 1e-5}


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        name: of the target, and of its folder in a bundle.
        layouts: layout of its train step -> dtypes of frozen matrices in it; defaults come first.
        facts: class of its entry in a manifest.
        sampler: file of its patch sampler.
        needs_to_export: modules that its exporter imports.
        needs_to_train: modules that its session imports.
        tools: packages whose versions a manifest records.
        tolerances: kind of tensor -> largest `Difference.relative` that passes verify.
        tails: what may take the place of the blocks after the last trained one.
        computes: how products with frozen matrices can be computed; the default comes first.
    """

    name: str
    layouts: Mapping[str, tuple[Dtype, ...]]
    facts: type[Facts]
    sampler: str
    needs_to_export: tuple[str, ...]
    needs_to_train: tuple[str, ...]
    tools: tuple[str, ...]
    tolerances: Mapping[str, float]
    tails: tuple[Tail, ...] = TAILS
    computes: tuple[Compute, ...] = (WIDE,)

    @property
    def module(self) -> str:
        """Name of its modules in exporter and runtime."""
        return self.name.replace("-", "_")


TARGETS = {
    target.name: target
    for target in (
        Target(
            name="onnx",
            layouts={FUSED: (WIDE,), RECOMPUTE: (WIDE,), STREAMED: DTYPES},
            facts=OnnxFacts,
            sampler=SAMPLER,
            needs_to_export=("onnx", "onnxscript"),
            needs_to_train=("onnxruntime",),
            tools=("torch", "onnx", "onnxscript"),
            tolerances=_FLOAT32,
            computes=(WIDE, INT8, ROTATED),
        ),
        Target(
            name="ort-training",
            layouts={FUSED: (WIDE,)},
            facts=OrtTrainingFacts,
            sampler=SAMPLER,
            needs_to_export=("onnx", "onnxscript", "onnxruntime.training"),
            needs_to_train=("onnxruntime.training",),
            tools=("torch", "onnx", "onnxscript", "onnxruntime-training-cpu"),
            tolerances=_FLOAT32,
            # Its gradient builder differentiates everything between the loss and the LoRA.
            tails=(STORED, THROUGH),
        ),
        Target(
            name="executorch",
            layouts={FUSED: (WIDE,)},
            facts=ExecuTorchFacts,
            sampler=SAMPLER_PROGRAM,
            needs_to_export=("executorch",),
            needs_to_train=("torch", "executorch"),
            tools=("torch", "executorch"),
            tolerances=_EXECUTORCH,
            computes=(WIDE, INT8, ROTATED),
        ),
    )
}
"""Every target by name."""


# ---------------------------------------------------------------- their variants


@dataclass(frozen=True)
class TargetVariant:
    """A target, one of its layouts, how frozen matrices are stored, and how products with them are
    computed.
    """

    target: str
    layout: str = FUSED
    dtype: str = WIDE
    compute: str = WIDE

    @property
    def stored(self) -> str:
        """See `stored_as`."""
        return stored_as(self.dtype, self.compute)

    def __str__(self) -> str:
        """As `variant_of` reads it: "onnx", "onnx:streamed", "onnx:streamed:int8",
        "onnx:fused:int8:int8".
        """
        parts = [self.target, self.layout, self.dtype, self.compute]
        for default in (WIDE, WIDE, FUSED):
            if parts[-1] != default:
                break
            parts.pop()
        return ":".join(parts)


VARIANTS = tuple(
    TargetVariant(target.name, layout, dtype)
    for target in TARGETS.values()
    for layout, dtypes in target.layouts.items()
    for dtype in dtypes
)
"""Every variant of every target that computes in float32."""
INT8_VARIANTS = tuple(
    TargetVariant(target.name, layout, INT8, compute)
    for target in TARGETS.values()
    for layout in target.layouts
    for compute in target.computes
    if compute != WIDE
)
"""Every variant that computes in int8."""


def variant_of(name: str) -> TargetVariant:
    """A variant by name, "onnx:streamed:int8"; layout, dtype and compute may be left out.

    Raises:
        BadInput: there is no such variant.
    """
    target, layout, dtype, compute, *more = [*name.split(":"), "", "", ""]
    asked = TargetVariant(target, layout or FUSED, dtype or WIDE, compute or WIDE)
    every = VARIANTS + INT8_VARIANTS
    if any(more) or asked not in every:
        raise BadInput("--target", found=name, expected=", ".join(map(str, every)))
    return asked


def check_targets(names: list[str] | None, where: str = "--target") -> None:
    """Raise `BadInput` for a name that is no target."""
    for name in names or []:
        if name not in TARGETS:
            raise BadInput(where, found=f"unknown target {name!r}", expected=", ".join(TARGETS))


def tail_faults(tail: Tail, targets: Iterable[str]) -> list[BadInput]:
    """A fault for each of ``targets`` that cannot train with this tail."""
    return [
        BadInput(
            "plan.tail",
            found=f"{tail}, with target {name}",
            expected=f"{' or '.join(TARGETS[name].tails)}: the gradient builder of {name} cannot "
            "take a part of the graph for a constant",
            remedy=f"take another tail, or leave {name} out of export.targets",
        )
        for name in targets
        if tail not in TARGETS[name].tails
    ]


def compute_faults(weights: Dtype, compute: Compute, targets: Iterable[str]) -> list[BadInput]:
    """What is wrong with computing this way: other weights, or a target that cannot."""
    if compute == WIDE:
        return []
    faults = []
    if weights != INT8:
        faults.append(
            BadInput(
                "export.compute",
                found=f"{compute}, with weights = {weights!r}",
                expected='weights = "int8": the products read the weights as they are stored',
                remedy='set weights = "int8" under [export], or leave compute out',
            )
        )
    able = [name for name, target in TARGETS.items() if compute in target.computes]
    if not set(able) & set(targets):
        faults.append(
            BadInput(
                "export.compute",
                found=f"{compute}, with target {', '.join(targets)}",
                expected=f"{' or '.join(able)} among the targets",
                remedy="add it to [export] targets, or leave compute out",
            )
        )
    return faults
