"""What training takes on a device: memory, storage and time of each target and layout.

Predicted from the shapes of a plan (`edge_dit.cost`) and a device profile. Memory is what a
training process has at its peak, batch 1:

    anonymous = the runtime's own
              + activations                     fused: kept by all trained blocks
                                                recompute, streamed: borders, and kept by one block
              + one block's worth of transients while a gradient is computed
              + LoRA, moments, gradients, and the optimizer's new LoRA and moments: 7 x LoRA
              + one draw
    file      = the runtime's own + frozen weights in use (streamed: one block at a time)

File pages can be evicted, anonymous memory cannot; a budget in RAM counts both. How well this holds
is measured by ``tests/benchmarks/footprint.py``.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from edge_dit.cost import FLOAT, Cost, Shapes
from edge_dit.documents import read_document, validated, write_document
from edge_dit.execution import Execution

MIB = 2**20
LORA_COPIES = 7
"""Adapter, two moments and gradients; and, while it runs, what the optimizer makes of them."""
BYTES_OF = {"float32": 4, "float16": 2, "int8": 1}
"""Of a stored element of a frozen matrix."""
WIDENED = 0.6
"""Share of a block's matrices that lie widened to float32 at once, in layouts that store less."""


@dataclass(frozen=True)
class Runtime:
    """What a target's runtime takes for itself, and how fast it is.

    Attributes:
        anonymous, file: bytes of a process that has loaded a bundle of no size.
        flops: floating-point operations per second in a training step, once
            the time for what it keeps is taken off.
        keep: seconds a byte of kept activations costs, in elementwise work.
    """

    anonymous: int
    file: int
    flops: float
    keep: float


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

    def runtime(self, execution: Execution) -> Runtime:
        """Of one way to train."""
        own = f"{execution.target}:{execution.layout}"
        return self.runtimes.get(own) or self.runtimes[execution.target]

    def at(self, gemm: float, name: str = "this machine") -> Profile:
        """A machine of the same kind whose large matrix products run at ``gemm``."""
        faster = gemm / self.gemm
        runtimes = {
            kind: replace(r, flops=r.flops * faster, keep=r.keep / faster)
            for kind, r in self.runtimes.items()
        }
        return Profile(name, gemm, runtimes)


REFERENCE = Profile(
    "a 2-core x86 machine with AVX2",
    gemm=80e9,
    runtimes={
        "onnx": Runtime(47 * MIB, 42 * MIB, 60e9, 1e-9),
        "onnx:recompute": Runtime(47 * MIB, 42 * MIB, 60e9, 1e-9),
        "onnx:streamed": Runtime(47 * MIB, 42 * MIB, 60e9, 1e-9),
        "ort-training": Runtime(47 * MIB, 42 * MIB, 60e9, 1e-9),
        "executorch": Runtime(280 * MIB, 128 * MIB, 60e9, 1e-9),
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
    remedy = "see edge_dit/footprint.py for what a profile holds"
    raw = read_document(path, "a device profile", remedy)
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
        self._known: dict[tuple[range | tuple[int, ...], int], tuple[Cost, int, int]] = {}

    def _parts(self, trained: range | tuple[int, ...], rank: int) -> tuple[Cost, int, int]:
        """Cost of the blocks; kept activations, and frozen bytes, of the largest alone."""
        if (trained, rank) not in self._known:
            kinds = {self.shapes.kinds[number]: number for number in reversed(trained)}
            alone = [self.shapes.cost((number,), rank) for number in kinds.values()]
            self._known[trained, rank] = (
                self.shapes.cost(trained, rank),
                max(one.activation_bytes for one in alone),
                max(one.frozen_bytes for one in alone),
            )
        return self._known[trained, rank]

    def of(self, trained: range | tuple[int, ...], rank: int, execution: Execution) -> Footprint:
        """What training some blocks takes.

        Args:
            trained: their numbers, ascending.
            rank: of the LoRA.
            execution: how.
        """
        shapes, runtime = self.shapes, self.profile.runtime(execution)
        cost, block, weights = self._parts(trained, rank)
        width = BYTES_OF[execution.dtype]
        stored = cost.frozen_bytes * width // FLOAT
        activations, used, widened = cost.activation_bytes + block, stored, 0
        if execution.layout != "fused":
            activations = 2 * block + len(trained) * shapes.border_bytes
        if execution.layout == "streamed":
            used = weights * width // FLOAT
            widened = int(WIDENED * weights) if width < FLOAT else 0
        copies = 1
        if execution.target == "executorch":  # packed by XNNPACK, for both directions
            copies = 2
        lora = FLOAT * cost.lora
        draw = cost.bank_bytes
        seconds = cost.flops / runtime.flops + activations * runtime.keep
        return Footprint(
            anonymous=runtime.anonymous + activations + widened + LORA_COPIES * lora + draw,
            file=runtime.file + copies * used,
            bundle=copies * stored + lora,
            draw=draw // (2 if self.bank == "float16" else 1),
            flops=cost.flops,
            seconds=seconds,
        )
