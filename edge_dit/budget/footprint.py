"""What training takes on a device: memory, storage and time of each target and layout.

Predicted from the shapes of a plan (`edge_dit.budget.cost`) and a device profile. Memory is what a
training process has at its peak, batch 1:

    anonymous = the runtime's own
              + what is kept for the backward pass    fused: of all trained blocks
                                                      recompute, streamed: borders, and of one block
              + what else a graph runtime holds until then: a block's largest tensor or two,
                transposed say, for every block whose step is in the graph
              + transients while a gradient is computed: a share of what one block keeps, and some
                tensors as large as its largest (the scores of softmax attention, say)
              + LoRA, gradients, two moments, and where the optimizer does not work in place what
                it makes of them: copies x LoRA
              + one draw
              + weights that are not mapped           executorch: all, packed for each direction;
                                                      float16 and int8: some of a block's,
                                                      widened to float32
    file      = the runtime's own + frozen weights mapped (streamed: of one block at a time;
                executorch: the largest matrix, while it is packed)

File pages can be evicted, anonymous memory cannot; a budget in RAM counts both. How well this holds
is measured by ``tests/benchmarks/footprint.py``.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from edge_dit.budget.cost import FLOAT, Cost, Shapes
from edge_dit.contract.targets import PIECE, TargetVariant
from edge_dit.store.documents import read_document, validated, write_document

MB = 10**6
BYTES_OF = {"float32": 4, "float16": 2, "int8": 1}
"""Of a stored element of a frozen matrix."""
WIDENED = 1.2
"""Matrices as large as a block's largest that lie widened to float32 at once, where they are stored
as less; of larger ones only `PIECE` bytes are."""


@dataclass(frozen=True)
class Runtime:
    """What a target's runtime takes for itself, and how fast it is.

    Attributes:
        anonymous, file: bytes of a process that has loaded a bundle of no size.
        share: of what one block keeps, that is memory while a gradient is computed.
        tensors: as large as the block's largest, that are too.
        held: such tensors for every trained block.
        copies: of the LoRA.
        flops: floating-point operations per second in a training step.
    """

    anonymous: int
    file: int
    share: float
    tensors: float
    held: float
    copies: int
    flops: float


@dataclass(frozen=True)
class Profile:
    """A device.

    Attributes:
        name: for people.
        gemm: float32 operations per second of a large matrix product, by which rates scale.
        runtimes: by target, and by "onnx:recompute" and "onnx:streamed" for these layouts.
    """

    name: str
    gemm: float
    runtimes: dict[str, Runtime]

    def runtime(self, execution: TargetVariant) -> Runtime:
        """Of one way to train."""
        own = f"{execution.target}:{execution.layout}"
        return self.runtimes.get(own) or self.runtimes[execution.target]

    def at(self, gemm: float, name: str = "this machine") -> Profile:
        """A machine of the same kind whose large matrix products run at ``gemm``."""
        faster = gemm / self.gemm
        runtimes = {kind: replace(r, flops=r.flops * faster) for kind, r in self.runtimes.items()}
        return Profile(name, gemm, runtimes)


REFERENCE = Profile(
    "a 2-core x86 machine with AVX2",
    gemm=80e9,
    runtimes={
        "onnx": Runtime(58 * MB, 43 * MB, 0.3, 3.9, 0.96, 4, 56e9),
        "onnx:recompute": Runtime(58 * MB, 43 * MB, 0.8, 2.6, 1.15, 4, 42e9),
        "onnx:streamed": Runtime(61 * MB, 43 * MB, 0.5, 3.0, 0, 4, 32e9),
        "ort-training": Runtime(54 * MB, 43 * MB, 0.0, 2.35, 0.79, 7, 54e9),
        "executorch": Runtime(290 * MB, 93 * MB, 0.25, 2.6, 0, 8, 54e9),
    },
)
"""Where the figures of README were measured; Python's own share is in it."""


def calibrated(seconds: float = 1.0) -> Profile:
    """`REFERENCE` with the speed of this machine, by matrix products for about ``seconds``."""
    one, other = np.ones((1024, 1024), np.float32), np.ones((1024, 1024), np.float32)
    best, until = np.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        np.matmul(one, other)
        best = min(best, time.perf_counter() - started)
    return REFERENCE.at(2 * 1024**3 / best)


def read_profile(path: Path) -> Profile:
    """A device profile from a JSON file.

    Raises:
        BadInput: unreadable, or not a profile.
    """
    remedy = "see edge_dit/budget/footprint.py for what a profile holds"
    raw = read_document(path, "a device profile", remedy, sealed=False)
    return validated(path, TypeAdapter(Profile), raw, remedy)


def write_profile(profile: Profile, path: Path) -> None:
    """Write a device profile."""
    write_document(path, asdict(profile))


@dataclass(frozen=True)
class Footprint:
    """What one way to train takes.

    Attributes:
        anonymous, file: peak bytes of a training process, see the module.
        bundle: bytes of the target's files.
        draw: bytes of a stored draw.
        flops: operations of a step.
        seconds: of a step.
    """

    anonymous: int
    file: int
    bundle: int
    draw: int
    flops: int
    seconds: float

    @property
    def ram(self) -> int:
        """What a budget in RAM must hold."""
        return self.anonymous + self.file


class Footprints:
    """Footprints of a model's sub-graphs at one patch size.

    Args:
        shapes: of the model.
        profile: of the device.
        bank: dtype of the bank's large tensors.
    """

    def __init__(self, shapes: Shapes, profile: Profile, bank: str = "float32") -> None:
        self.shapes, self.profile, self.bank = shapes, profile, bank
        self._known: dict[tuple[range | tuple[int, ...], int], tuple[Cost, int, int, int]] = {}

    def _parts(self, trained: range | tuple[int, ...], rank: int) -> tuple[Cost, int, int, int]:
        """Cost of the blocks; kept bytes, largest tensor and frozen bytes of the largest alone."""
        if (trained, rank) not in self._known:
            kinds = {self.shapes.kinds[number]: number for number in reversed(trained)}
            alone = [self.shapes.cost((number,), rank) for number in kinds.values()]
            self._known[trained, rank] = (
                self.shapes.cost(trained, rank),
                max(one.activation_bytes for one in alone),
                max(one.largest_bytes for one in alone),
                max(one.frozen_bytes for one in alone),
            )
        return self._known[trained, rank]

    def of(
        self, trained: range | tuple[int, ...], rank: int, execution: TargetVariant
    ) -> Footprint:
        """What training some blocks takes.

        Args:
            trained: their numbers, ascending.
            rank: of the LoRA.
            execution: how.
        """
        shapes, runtime = self.shapes, self.profile.runtime(execution)
        cost, block, largest, weights = self._parts(trained, rank)
        width = BYTES_OF[execution.dtype]
        stored = cost.frozen_bytes * width // FLOAT
        borders = len(trained) * shapes.border_bytes
        kept = {
            "fused": cost.activation_bytes,
            "recompute": borders + block,
            "streamed": borders + block,
        }[execution.layout]
        mapped, unmapped = stored, 0
        if execution.layout == "streamed":
            mapped = weights * width // FLOAT
            unmapped = WIDENED * min(cost.widest_bytes, PIECE) if width < FLOAT else 0
        elif execution.target == "executorch":
            mapped, unmapped = cost.matrix_bytes, stored + cost.turned_bytes
        lora = FLOAT * cost.lora
        tensors = runtime.tensors + runtime.held * len(trained)
        activations = kept + runtime.share * block + tensors * largest
        held = activations + unmapped + runtime.copies * lora + cost.bank_bytes
        return Footprint(
            anonymous=int(runtime.anonymous + held),
            file=runtime.file + mapped,
            bundle=stored + lora,
            draw=cost.bank_bytes // (2 if self.bank == "float16" else 1),
            flops=cost.flops,
            seconds=cost.flops / runtime.flops,
        )
