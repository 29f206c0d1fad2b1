"""The ways to train: targets, their layouts, and how frozen weights are stored."""

from __future__ import annotations

from dataclasses import dataclass

from edge_dit.errors import BadInput

PIECE = 32 * 2**20
"""Bytes of float32 at most that a weight is widened to at once, see
`edge_dit_export.passes_onnx.weights_in_fewer_bytes`.
"""


@dataclass(frozen=True)
class Execution:
    """One way to train: a target, its layout, and how frozen weights are stored."""

    target: str
    layout: str = "fused"
    dtype: str = "float32"

    def __str__(self) -> str:
        """As `execution_of` reads it: "onnx", "onnx:streamed", "onnx:streamed:int8"."""
        parts = [self.target, self.layout, self.dtype]
        for default in ("float32", "fused"):
            if parts[-1] == default:
                parts.pop()
        return ":".join(parts)


EXECUTIONS = (
    Execution("onnx"),
    Execution("onnx", "recompute"),
    Execution("onnx", "streamed"),
    Execution("onnx", "streamed", "float16"),
    Execution("onnx", "streamed", "int8"),
    Execution("ort-training"),
    Execution("executorch"),
)


def execution_of(name: str) -> Execution:
    """An execution by name, "onnx:streamed:int8"; layout and dtype may be left out.

    Raises:
        BadInput: no such thing.
    """
    target, layout, dtype, *more = [*name.split(":"), "", ""]
    found = Execution(target, layout or "fused", dtype or "float32")
    if any(more) or found not in EXECUTIONS:
        raise BadInput("--target", found=name, expected=", ".join(map(str, EXECUTIONS)))
    return found
