"""Memory, storage and time that training takes on a device, for each target and layout.

All figures are predicted from a sub-graph's shapes (`edge_dit.budget.cost`) and a device profile.
Memory is the peak of a training process with batch 1. A budget in RAM counts anonymous memory and
file pages, although a device short of memory can evict file pages and read them again:

    anonymous = memory of the runtime itself
              + activations that wait for the backward pass  one small function for each layout
              + scratch memory of one block's backward pass  `Runtime.scratch`, `Runtime.tensors`
              + tensors that a graph keeps for every block   `Runtime.tensors_per_block`
              + LoRA, gradients, moments and their copies    `Runtime.lora_copies`
              + one draw of the bank
              + frozen weights that are not mapped           one small function for each layout
    file      = files of the runtime itself + frozen weights that are mapped

`measured.json` holds what was measured beside what is predicted, and tests/benchmarks/footprint.py
measures it again. Every prediction there is off by at most `MEMORY_ERROR` and `TIME_ERROR`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.resources import files
from math import inf
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field, TypeAdapter

from edge_dit.budget.cost import FLOAT, Cost, Shapes, shapes_of
from edge_dit.contract.names import MOMENTS, STORED, THROUGH, Tail
from edge_dit.contract.targets import (
    INT4,
    INT8,
    PIECE,
    ROTATED,
    STREAMED,
    TARGETS,
    WIDE,
    TargetVariant,
)
from edge_dit.errors import BadInput
from edge_dit.models.quantize import GROUP
from edge_dit.planning.plan import Plan
from edge_dit.store.documents import STRICT, read_document, validated, write_document

MB = 10**6
PASSES = 3
"""How often a step of the streamed layout goes through its weights: once forward, and twice in the
backward pass, which computes each block again."""
MEMORY_ERROR, TIME_ERROR = 0.10, 0.20
"""Largest |predicted / measured - 1| over the rows of measured.json. Memory: anonymous memory and
file pages, each on its own. Time: of a step."""
BYTES_OF = {"float32": 4, "float16": 2, "int8": 1, INT4: 1 / 2 + FLOAT / GROUP}
"""Bytes of a stored element of a frozen matrix, by dtype."""
WIDENED, UNPACKED = 1.2, 2.3
"""How many copies of a block's largest matrix lie in memory as float32 at once, where weights are
stored in a narrower dtype; and in int4, where bytes are unpacked too (SANA-0.6B, 4 blocks: 30 MB
more than in int8). Of a matrix above `PIECE` bytes only a piece of that size is widened."""

ROTATED_TIME = 1.1
"""Step time of rotated int8 products over that of plain ones."""


# ---------------------------------------------------------------- the device


@dataclass(frozen=True)
class Runtime:
    """Memory that a target's runtime adds to what the shapes say, and its speed.

    Attributes:
        anonymous: bytes of anonymous memory of a process that has loaded an empty bundle.
        file: bytes of file pages of that process.
        saved: fraction of the activations saved by autograd that this runtime saves too.
        scratch: fraction of one block's saved activations that its backward pass holds as scratch
            memory.
        tensors: number of further scratch tensors, each as large as the block's largest activation
            (the scores of softmax attention, for example).
        tensors_per_block: number of such tensors that stay until the backward pass for every
            trained block in the graph (a transposed activation, for example).
        lora_copies: memory of LoRA, gradients, moments and what the optimizer makes of them, as a
            multiple of the LoRA's own bytes.
        flops: floating-point operations per second of a training step.
        seconds_per_byte: time that comes to them, for every byte of the block's largest activation
            in every trained block: kernels that run on one thread (softmax, for example).
    """

    anonymous: int
    file: int
    saved: float
    scratch: float
    tensors: float
    tensors_per_block: float
    lora_copies: int
    flops: float
    seconds_per_byte: float = 0.0

    __pydantic_config__ = STRICT

    def faster(self, times: float) -> Runtime:
        """The same on a machine that computes ``times`` as fast."""
        slow = self.seconds_per_byte / times
        return replace(self, flops=self.flops * times, seconds_per_byte=slow)


def name_of(variant: TargetVariant) -> str:
    """Key of a target, its layout and how it computes: "onnx", "onnx:streamed",
    "onnx:streamed:int8:int8". Rotated products take the memory of those that are not.
    """
    wide = variant.compute == WIDE
    return str(replace(variant, dtype=WIDE) if wide else replace(variant, compute=INT8))


@dataclass(frozen=True)
class Profile:
    """A device.

    Attributes:
        name: for people.
        gemm: float32 operations per second of a large matrix product. Speeds scale with it.
        runtimes: by target ("onnx"). A layout with figures of its own has a further entry
            ("onnx:streamed"), and so has one that computes in int8 ("onnx:streamed:int8:int8").
        read: bytes per second that are read from storage; None if files stay in memory once read.
    """

    name: str
    gemm: float
    runtimes: dict[str, Runtime]
    read: Annotated[float, Field(gt=0)] | None = None

    __pydantic_config__ = STRICT

    def runtime(self, variant: TargetVariant) -> Runtime:
        """The variant's own figures, else those of its layout in float32, else of its target.

        Raises:
            BadInput: the profile has none of them.
        """
        wide = TargetVariant(variant.target, variant.layout)
        names = name_of(variant), name_of(wide), variant.target
        figures = next((self.runtimes[name] for name in names if name in self.runtimes), None)
        if figures is None:
            raise BadInput(
                "device profile",
                found=f"no figures of {variant.target} in {self.name!r}, but of "
                f"{', '.join(self.runtimes) or 'nothing'}",
                expected=f'a key "{variant.target}" in "runtimes"',
                remedy="add it, or name the targets to plan for with --target",
            )
        return figures

    def at(self, gemm: float, name: str = "this machine") -> Profile:
        """A machine of the same kind whose large matrix products run at ``gemm`` operations per
        second.
        """
        faster = gemm / self.gemm
        runtimes = {kind: r.faster(faster) for kind, r in self.runtimes.items()}
        return replace(self, name=name, gemm=gemm, runtimes=runtimes)


REFERENCE = Profile(
    "a 2-core x86 machine with AVX-512 and VNNI",
    gemm=80e9,
    runtimes={
        "onnx": Runtime(58 * MB, 41 * MB, 0.35, 1.23, 0.0, 2.87, 4, 90e9),
        "onnx:recompute": Runtime(58 * MB, 41 * MB, 1.0, 1.03, 2.2, 1.14, 4, 65e9),
        "onnx:streamed": Runtime(61 * MB, 41 * MB, 1.0, 0.65, 2.3, 0.3, 4, 50e9),
        "onnx:fused:int8:int8": Runtime(58 * MB, 41 * MB, 0.32, 1.5, 0.5, 2.62, 4, 136e9),
        "onnx:recompute:int8:int8": Runtime(58 * MB, 41 * MB, 1.0, 1.5, 2.3, 1.5, 4, 100e9),
        "onnx:streamed:int8:int8": Runtime(61 * MB, 41 * MB, 1.0, 0.85, 3.1, 0.02, 4, 82e9),
        "ort-training": Runtime(54 * MB, 43 * MB, 0.5, 0.49, 0.0, 2.78, 7, 54e9),
        "executorch": Runtime(158 * MB, 88 * MB, 1.0, 0.0, 3.34, 0.0, 8, 140e9, 12e-9),
        "executorch:fused:int8:int8": Runtime(
            158 * MB, 88 * MB, 1.0, 0.04, 3.45, 0.54, 8, 194e9, 8e-9
        ),
    },
)
"""The machine of measured.json. Memory of Python itself is part of each runtime's own.

The figures are fitted to what was measured. Two targets keep less than autograd saves: the fused
onnx step computes what is cheap again, and onnxruntime-training keeps about half.
"""


def calibrated(seconds: float = 1.0) -> Profile:
    """`REFERENCE` at this machine's speed, measured by matrix products for about ``seconds``."""
    one, other = np.ones((1024, 1024), np.float32), np.ones((1024, 1024), np.float32)
    best, until = np.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        np.matmul(one, other)
        best = min(best, time.perf_counter() - started)
    return REFERENCE.at(2 * 1024**3 / best)


PROFILE_KEYS = (
    'an object with "name", "gemm" (float32 operations per second of a large matrix product), if '
    'need be "read" (bytes per second, above 0) and '
    f'"runtimes", which has {", ".join(TARGETS)} or some of them, each an object with '
    + ", ".join(f'"{field.name}"' for field in fields(Runtime))
    + " (bytes, multiples, and operations per second)"
)
REMEDY = (
    "leave --profile out to take this machine, or write a file with "
    "edge_dit.budget.footprint.write_profile"
)


def read_profile(path: Path) -> Profile:
    """A device profile from a JSON file.

    Raises:
        BadInput: the file is unreadable, or is not a profile.
    """
    raw = read_document(path, f"a device profile: {PROFILE_KEYS}", REMEDY, sealed=False)
    try:
        return validated(path, TypeAdapter(Profile), raw, REMEDY)
    except BadInput as fault:
        raise BadInput(path, found=fault.found, expected=PROFILE_KEYS, remedy=REMEDY) from None


def write_profile(profile: Profile, path: Path) -> None:
    """Write a device profile as JSON."""
    write_document(path, asdict(profile))


# ---------------------------------------------------------------- what each layout holds


@dataclass(frozen=True)
class Sizes:
    """Sizes of a sub-graph from which every layout's memory follows, in float32.

    Attributes:
        cost: of the whole sub-graph.
        differentiated: number of blocks that a gradient goes back through.
        borders: bytes of the states between blocks, one for each of them.
        block_activations: most bytes that one trained block saves for its backward pass.
        largest_activation: bytes of the largest tensor among those.
        block_weights: most bytes of frozen weights of one block that runs, with the head's.
    """

    cost: Cost
    differentiated: int
    borders: int
    block_activations: int
    largest_activation: int
    block_weights: int


class Held(NamedTuple):
    """What a layout holds in memory, bytes.

    Attributes:
        activations: tensors that wait for the backward pass.
        mapped: file pages of frozen weights.
        unmapped: anonymous memory of frozen weights.
    """

    activations: float
    mapped: int
    unmapped: float = 0


def fused(sizes: Sizes, width: float) -> Held:
    """One graph computes the step: activations of all blocks are saved, all weights are mapped."""
    return Held(sizes.cost.activation_bytes, _stored(sizes.cost.frozen_bytes, width))


def recompute(sizes: Sizes, width: float) -> Held:
    """One graph saves the states between blocks and computes each block again on its way back."""
    activations = sizes.borders + sizes.block_activations
    return Held(activations, _stored(sizes.cost.frozen_bytes, width))


def streamed(sizes: Sizes, width: float) -> Held:
    """One block is loaded at a time, and the next while it runs. Weights in a narrower dtype are
    widened for each product.
    """
    copies = 0.0 if width == FLOAT else WIDENED if width >= 1 else UNPACKED
    widened = copies * min(sizes.cost.largest_transposed_bytes, PIECE)
    activations = sizes.borders + sizes.block_activations
    two = min(2 * sizes.block_weights, sizes.cost.frozen_bytes)
    return Held(activations, _stored(two, width), widened)


def streamed_in_int8(sizes: Sizes, width: float) -> Held:
    """As streamed; products read the weights as they are stored."""
    return streamed(sizes, width)._replace(unmapped=0)


def packed(sizes: Sizes, width: float) -> Held:
    """All weights are copied into packed form, and those of the backward pass a second time,
    transposed. The largest is mapped while it is packed.
    """
    cost = sizes.cost
    copies = _stored(cost.frozen_bytes, width) + cost.transposed_bytes
    return Held(cost.activation_bytes, cost.largest_weight_bytes, copies)


def packed_in_int8(sizes: Sizes, width: float) -> Held:
    """As packed, both copies in int8; each block is computed again in the backward pass."""
    cost = sizes.cost
    copies = _stored(cost.frozen_bytes + cost.transposed_bytes, width)
    largest = _stored(cost.largest_weight_bytes, width)
    return Held(recompute(sizes, width).activations, largest, copies)


def _slowed(variant: TargetVariant) -> float:
    """By how much a step takes longer than that of its runtime's figures."""
    return ROTATED_TIME if variant.compute == ROTATED else 1.0


def _stored(float_bytes: int, width: float) -> int:
    return int(float_bytes * width / FLOAT)


LAYOUTS: dict[str, Callable[[Sizes, float], Held]] = {
    "onnx": fused,
    "onnx:recompute": recompute,
    "onnx:streamed": streamed,
    "ort-training": fused,
    "executorch": packed,
    "onnx:fused:int8:int8": fused,
    "onnx:recompute:int8:int8": recompute,
    "onnx:streamed:int8:int8": streamed_in_int8,
    "executorch:fused:int8:int8": packed_in_int8,
}
"""What each target layout holds, by `name_of`: a function of the sizes and of the bytes of a stored
weight element. A new target or layout adds one entry here, and one to a profile's runtimes."""


# ---------------------------------------------------------------- the prediction


@dataclass(frozen=True)
class Footprint:
    """Predicted cost of one way to train.

    Attributes:
        anonymous: peak bytes of anonymous memory of a training process.
        file: peak bytes of file pages of that process.
        bundle: bytes of the target's files.
        draw: bytes of a stored draw.
        flops: operations of a step.
        seconds: time of a step, reading included.
        read: bytes of weights that a step reads from storage.
    """

    anonymous: int
    file: int
    bundle: int
    draw: int
    flops: int
    seconds: float
    read: int = 0

    @property
    def ram(self) -> int:
        """Bytes that a budget in RAM must hold: anonymous memory and file pages."""
        return self.anonymous + self.file


class Footprints:
    """Footprints of a model's sub-graphs at one patch size.

    Args:
        shapes: of the model at that patch size.
        profile: of the device.
        bank: dtype of the bank's large tensors.
        kept: copies of the LoRA that a run keeps besides (`Plan.kept`).
    """

    def __init__(
        self, shapes: Shapes, profile: Profile, bank: str = "float32", kept: int = 0
    ) -> None:
        self.shapes, self.profile, self.bank, self.kept = shapes, profile, bank, kept
        self._sizes: dict[tuple[Sequence[int], int, Tail], Sizes] = {}
        self._alone: dict[tuple[int, int], Cost] = {}

    def of(
        self,
        trained: range | tuple[int, ...],
        rank: int,
        variant: TargetVariant,
        tail: Tail = STORED,
        ram: float = inf,
    ) -> Footprint:
        """Footprint of one way to train.

        Args:
            trained: numbers of the trained blocks, ascending.
            rank: LoRA rank.
            variant: target, layout and dtype of the stored weights.
            tail: what takes the place of the blocks after the last trained one.
            ram: bytes of memory that the process may take. Weights of the streamed layout that do
                not fit are read in every step, if the profile says how fast.
        """
        if (trained, rank, tail) not in self._sizes:
            self._sizes[trained, rank, tail] = self._sizes_of(trained, rank, tail)
        sizes, runtime = self._sizes[trained, rank, tail], self.profile.runtime(variant)
        width = BYTES_OF[variant.dtype]
        held, cost = LAYOUTS[name_of(variant)](sizes, width), sizes.cost
        lora = FLOAT * cost.lora
        tensors = runtime.tensors + runtime.tensors_per_block * sizes.differentiated
        scratch = runtime.scratch * sizes.block_activations + tensors * sizes.largest_activation
        seconds = cost.flops / runtime.flops + runtime.seconds_per_byte * (
            sizes.differentiated * sizes.largest_activation
        )
        anonymous = runtime.anonymous + runtime.saved * held.activations + scratch + held.unmapped
        copies = runtime.lora_copies + self.kept
        if variant.target != "ort-training":  # which keeps a first moment in any case
            copies -= len(MOMENTS) - self.shapes.moments
        anonymous = int(anonymous + copies * lora + cost.bank_bytes)
        weights = _stored(cost.frozen_bytes, width)
        read = 0
        if variant.layout == STREAMED and self.profile.read is not None:
            read = int(PASSES * max(0, weights - max(0, ram - anonymous - runtime.file)))
        return Footprint(
            anonymous=anonymous,
            file=runtime.file + held.mapped,
            bundle=weights + lora,
            draw=cost.bank_bytes // (2 if self.bank == "float16" else 1),
            flops=cost.flops,
            seconds=_slowed(variant) * seconds + read / (self.profile.read or inf),
            read=read,
        )

    def _sizes_of(self, trained: range | tuple[int, ...], rank: int, tail: Tail) -> Sizes:
        after = self.shapes.after(trained, tail)
        differentiated = [*trained, *(after if tail == THROUGH else ())]
        of_kinds = self._of_kinds(differentiated, rank)
        return Sizes(
            cost=self.shapes.cost(trained, rank, tail),
            differentiated=len(differentiated),
            borders=len(differentiated) * self.shapes.border_bytes,
            block_activations=max(cost.activation_bytes for cost in of_kinds),
            largest_activation=max(cost.largest_activation_bytes for cost in of_kinds),
            block_weights=max(
                cost.frozen_bytes for cost in self._of_kinds([*trained, *after], rank)
            ),
        )

    def _of_kinds(self, numbers: Sequence[int], rank: int) -> list[Cost]:
        """Costs of one block of each kind among some, trained alone."""
        kinds = {self.shapes.kinds[number]: number for number in reversed(numbers)}
        for kind, number in kinds.items():
            if (kind, rank) not in self._alone:
                self._alone[kind, rank] = self.shapes.cost((number,), rank)
        return [self._alone[kind, rank] for kind in kinds]


def footprints_of(plan: Plan, profile: Profile) -> Footprints:
    """Footprints at a plan's patch size.

    Args:
        plan: its grid, text, LoRA modules, bank and what a run keeps are read.
        profile: of the device.
    """
    _, shapes = shapes_of(plan)
    return Footprints(shapes, profile, plan.bank_dtype, plan.kept)


# ---------------------------------------------------------------- what was measured


@dataclass(frozen=True)
class Measured:
    """A measurement and its prediction.

    Attributes:
        case: name of the public configuration.
        trained: number of trained blocks, at 256 image tokens.
        execution: the variant in words ("onnx:streamed:int8").
        anonymous, file: measured peak bytes of a training process.
        seconds: measured time of a step.
        predicted_anonymous, predicted_file, predicted_seconds: the same, predicted.
    """

    case: str
    trained: int
    execution: str
    anonymous: float
    predicted_anonymous: float
    file: float
    predicted_file: float
    seconds: float
    predicted_seconds: float


def read_measured() -> tuple[str, list[Measured]]:
    """Name of the machine, and the rows of measured.json."""
    raw = json.loads((files("edge_dit.budget") / "measured.json").read_text("utf-8"))
    return raw["machine"], [Measured(**row) for row in raw["rows"]]
