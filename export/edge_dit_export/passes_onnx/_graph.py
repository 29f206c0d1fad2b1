"""What rewrites of ONNX graphs share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


def sides(value: ir.Value | None) -> tuple[int, ...]:
    """Shape of ``value``; () where a side of it, or all of it, is unknown."""
    shape = value.shape if value is not None else None
    return shape.numpy() if shape is not None and shape.is_static() else ()


def constant(graph: ir.Graph, values: np.ndarray | Sequence[int]) -> ir.Value:
    """An initialiser, shared by all that ask for the same values; a list becomes int64."""
    array = values if isinstance(values, np.ndarray) else np.array(values, np.int64)
    name = f"constant.{array.dtype}.{array.tolist()}".replace(" ", "")
    if name not in graph.initializers:
        ir.tape.Tape(graph).initializer(ir.tensor(array, name=name))
    return graph.initializers[name]
