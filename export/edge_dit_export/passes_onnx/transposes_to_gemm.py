"""Transposed matrices -> Gemm's transA / transB.

    MatMul(x, Transpose(W))       -> Gemm(x, W, transB=1)
    Gemm(x, Transpose(W), bias)   -> Gemm(x, W, bias, transB=1)

Both passes of the train step then read a frozen W as it is stored. Otherwise onnxruntime 1.19.2
folds its Transpose into a second copy of W when it loads the model, and copies a transposed
activation in every step.
"""

from __future__ import annotations

import onnx_ir as ir


def transposes_to_gemm(model: ir.Model) -> int:
    """Rewrite every MatMul and Gemm of which a factor is transposed, in place; Transposes that
    nothing uses any more are left to a clean-up.

    Returns:
        Number of nodes rewritten.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type not in ("MatMul", "Gemm") or any(_rank(v) != 2 for v in node.inputs[:2]):
            continue
        sources = [_transposed(value) for value in node.inputs[:2]]
        if sources == [None, None]:
            continue
        attributes = dict(node.attributes)
        inputs = list(node.inputs)
        for place, (flag, source) in enumerate(zip(("transA", "transB"), sources, strict=True)):
            if source is not None:
                inputs[place] = source
                before = attributes[flag].as_int() if flag in attributes else 0
                attributes[flag] = ir.AttrInt64(flag, 1 - before)
        gemm = ir.Node("", "Gemm", inputs, list(attributes.values()), name=node.name)
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [gemm], node.outputs, gemm.outputs
        )
        count += 1
    return count


def _rank(value: ir.Value | None) -> int | None:
    return len(value.shape) if value is not None and value.shape is not None else None


def _transposed(value: ir.Value | None) -> ir.Value | None:
    """What ``value`` is the transpose of, or None."""
    producer = value.producer() if value is not None else None
    return producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else None
