"""What the tests of the rewrites share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

OPSETS = 'ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]'


def parsed(graph: str) -> ir.Model:
    """A model of opset 18 and com.microsoft 1 around a graph in ONNX's textual syntax."""
    return ir.from_onnx_text(f"<{OPSETS}> {graph}")


def kinds(model: ir.Model) -> list[str]:
    """Operator of every node, in order."""
    return [node.op_type for node in model.graph]


def run(model: ir.Model, feeds: Mapping[str, Any]) -> list[Any]:
    """Outputs of a model, which the checker has to accept first.

    Args:
        model: is left as it is.
        feeds: an array or a torch tensor by the name of each input; a list of them for a sequence.
    """
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    arrays = {n: v if isinstance(v, list) else np.asarray(v) for n, v in feeds.items()}
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, arrays)
