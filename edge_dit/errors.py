"""The two ways a command ends early: bad input (exit code 2) and a failed check (exit code 1)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import partial
from itertools import chain
from types import ModuleType
from typing import Any

EXTRA_OF = {
    "torch": "host",
    "diffusers": "host",
    "peft": "host",
    "transformers": "host",
    "huggingface_hub": "host",
    "matplotlib": "host",
    "jinja2": "host",
    "cyclonedx": "host",
    "pillow_heif": "heic",
    "model_signing": "sign",
    "ray": "ray",
    "fsspec": "s3",
    "flwr": "flower",
    "dp_accounting": "flower",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "executorch": "executorch",
    "onnxruntime": "ort",
    "onnxruntime.training": "ort-training",
}
"""Module, or the package it is in -> extra of the distribution that installs it."""


PRINTED = 30
"""Most faults that are printed at once: of a thousand pictures, every one may have the same."""


class BadInput(Exception):
    """Input that edge-dit cannot work with; the command line prints it and exits with 2.

    Args:
        where: file, key or option at fault.
        found: what is there.
        expected: what should be.
        remedy: what the user can do now.
    """

    def __init__(self, where: object, *, found: str, expected: str = "", remedy: str = "") -> None:
        self.where, self.found, self.expected, self.remedy = str(where), found, expected, remedy
        super().__init__(str(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """How another process raises the same."""
        words = {"found": self.found, "expected": self.expected, "remedy": self.remedy}
        return partial(BadInput, **words), (self.where,)

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.found}"]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return "\n".join(lines)


class ManyFaults(BadInput):
    """Several faults of one input, reported together."""

    def __init__(self, where: object, faults: list[BadInput]) -> None:
        self.faults = faults
        super().__init__(where, found=f"{len(faults)} faults")

    def __reduce__(self) -> tuple[Any, ...]:
        """How another process raises the same."""
        return ManyFaults, (self.where, self.faults)

    def __str__(self) -> str:
        lines = [str(fault) for fault in self.faults[:PRINTED]]
        more = len(self.faults) - PRINTED
        return "\n".join([*lines, f"and {more} more faults"] if more > 0 else lines)


def raise_any(where: object, faults: Sequence[BadInput]) -> None:
    """Raise faults together; a single one as it is. Nothing is raised where there is none."""
    inner = (f.faults if isinstance(f, ManyFaults) else [f] for f in faults)
    every = list(chain.from_iterable(inner))
    if every:
        raise every[0] if len(every) == 1 else ManyFaults(where, every)


class CheckFailed(Exception):
    """A check the user asked for did not hold; the command line prints it and exits with 1."""


def require(module: str, purpose: str) -> ModuleType:
    """Import ``module``, or raise `BadInput` with the pip line of the extra that brings it.

    Args:
        module: a key of `EXTRA_OF`, or within a package that is one.
        purpose: what needs it, for the message ("the onnx target").
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing_extra(module, purpose) from error


def missing_extra(module: str, purpose: str) -> BadInput:
    """The error for a module that is not installed, with the pip line that brings it."""
    extra = EXTRA_OF.get(module) or EXTRA_OF[module.partition(".")[0]]
    return BadInput(
        module,
        found="not installed",
        expected=f"{purpose} needs it",
        remedy=f'pip install "edge-dit[{extra}]"',
    )


def is_installed(module: str) -> bool:
    """Whether ``module`` can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
