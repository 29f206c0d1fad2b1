"""The two ways a command ends early: bad input (exit code 2) and a failed check (exit code 1)."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

EXTRA_OF = {
    "torch": "host",
    "diffusers": "host",
    "peft": "host",
    "transformers": "host",
    "huggingface_hub": "host",
    "matplotlib": "host",
    "jinja2": "host",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "executorch": "executorch",
    "onnxruntime": "ort",
    "onnxruntime.training": "ort-training",
}
"""Module -> extra of the distribution that installs it."""


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

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.faults)


def together(where: object, faults: list[BadInput]) -> BadInput:
    """The error that reports all of ``faults``, of which there is at least one."""
    return faults[0] if len(faults) == 1 else ManyFaults(where, faults)


class CheckFailed(Exception):
    """A check the user asked for did not hold; the command line prints it and exits with 1."""


def require(module: str, purpose: str) -> ModuleType:
    """Import ``module``, or raise `BadInput` with the pip line of the extra that brings it.

    Args:
        module: a key of `EXTRA_OF`.
        purpose: what needs it, for the message ("the onnx target").
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing_extra(module, purpose) from error


def missing_extra(module: str, purpose: str) -> BadInput:
    """The error for a module that is not installed, with the pip line that brings it."""
    return BadInput(
        module,
        found="not installed",
        expected=f"{purpose} needs it",
        remedy=f'pip install "edge-dit[{EXTRA_OF[module]}]"',
    )


def is_installed(module: str) -> bool:
    """Whether ``module`` can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
