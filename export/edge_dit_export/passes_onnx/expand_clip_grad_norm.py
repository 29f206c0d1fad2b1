"""InplaceClipGradNorm -> standard operators that give the same bits in every run.

onnxruntime-training 1.19.2 keeps parameters in a hash map whose order changes from session to
session. InplaceClipGradNorm adds their squares up in that order, so the last bit of the norm
changes, and with it a resumed run. Here the sums of squares are sorted before they are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edge_dit.contract.adamw import CLIP_EPS
from edge_dit_export.passes_onnx._graph import constant


def expand_clip_grad_norm(model: ir.Model, count: int) -> None:
    """Rewrite the InplaceClipGradNorm of an optimizer_model.onnx, in place:

        squares = sort([sum(g^2) for g in gradients])
        clipped = [min(1, max_norm / (sqrt(sum(squares)) + 1e-6)) g for g in gradients]

    Args:
        model: has one InplaceClipGradNorm over a sequence of gradients.
        count: length of that sequence.
    """
    graph = model.graph
    clip = next(node for node in graph if node.op_type == "InplaceClipGradNorm")
    tape = ir.tape.Tape()

    def add(kind: str, inputs: Sequence[ir.Value | None], name: str, **settings: Any) -> ir.Value:
        return tape.op(kind, inputs, settings, output=ir.val(f"clip.{name}"))

    def number(value: float) -> ir.Value:
        return constant(graph, np.array([value], np.float32))

    gradients, squares = [], []
    for i in range(count):
        at = [clip.inputs[0], constant(graph, np.array(i, np.int64))]
        gradients.append(add("SequenceAt", at, f"gradient_{i}"))
        square = add("ReduceSumSquare", [gradients[i]], f"sum_{i}", keepdims=0)
        squares.append(add("Reshape", [square, constant(graph, [-1])], f"square_{i}"))
    joined = add("Concat", squares, "squares", axis=0)
    ordered, _ = tape.op_multi_out(
        "TopK",
        [joined, constant(graph, [count])],
        outputs=[ir.val("clip.sorted"), ir.val("clip.order")],
    )
    norm = add("Sqrt", [add("ReduceSum", [ordered], "square")], "norm")
    max_norm = number(clip.attributes["max_norm"].as_float())
    ratio = add("Div", [max_norm, add("Add", [norm, number(CLIP_EPS)], "sum")], "ratio")
    factor = add("Min", [ratio, number(1)], "factor")
    clipped = [add("Mul", [g, factor], f"clipped_{i}") for i, g in enumerate(gradients)]
    result = add("SequenceConstruct", clipped, "result")
    ir.convenience.replace_nodes_and_values(graph, clip, [clip], tape.nodes, clip.outputs, [result])
