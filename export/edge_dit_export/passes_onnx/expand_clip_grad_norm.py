"""InplaceClipGradNorm of onnxruntime-training -> standard operators, the same bits in every run.

onnxruntime 1.19.2 keeps parameters in a hash map whose order changes from session to session, and
InplaceClipGradNorm adds their squares up in that order: the norm's last bit, and with it a resumed
run, was not reproducible. Here the sums of squares are sorted before they are added.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edge_dit.contract.adamw import CLIP_EPS


def expand_clip_grad_norm(model: onnx.ModelProto, count: int) -> None:
    """Rewrite the InplaceClipGradNorm of an optimizer_model.onnx, in place:

        squares = sort([sum(g^2) for g in gradients])
        clipped = [min(1, max_norm / (sqrt(sum(squares)) + 1e-6)) g for g in gradients]

    Args:
        model: has one InplaceClipGradNorm over a sequence of gradients.
        count: length of that sequence.
    """
    graph = model.graph
    place, clip = next(
        (i, n) for i, n in enumerate(graph.node) if n.op_type == "InplaceClipGradNorm"
    )
    max_norm = next(a.f for a in clip.attribute if a.name == "max_norm")
    constants = {
        "clip.count": np.array([count], np.int64),
        "clip.flat": np.array([-1], np.int64),
        "clip.eps": np.array([CLIP_EPS], np.float32),
        "clip.max_norm": np.array([max_norm], np.float32),
        "clip.one": np.array([1], np.float32),
        **{f"clip.index_{i}": np.array(i, np.int64) for i in range(count)},
    }
    nodes = []

    def add(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        outputs = [output, f"{output}.order"] if kind == "TopK" else [output]
        nodes.append(helper.make_node(kind, inputs, outputs, name=output, **attributes))
        return output

    gradients, squares = [], []
    for i in range(count):
        at = [clip.input[0], f"clip.index_{i}"]
        gradients.append(add("SequenceAt", at, f"clip.gradient_{i}"))
        square = add("ReduceSumSquare", [gradients[i]], f"clip.sum_{i}", keepdims=0)
        squares.append(add("Reshape", [square, "clip.flat"], f"clip.square_{i}"))
    joined = add("Concat", squares, "clip.squares", axis=0)
    ordered = add("TopK", [joined, "clip.count"], "clip.sorted")
    norm = add("Sqrt", [add("ReduceSum", [ordered], "clip.square")], "clip.norm")
    ratio = add("Div", ["clip.max_norm", add("Add", [norm, "clip.eps"], "clip.sum")], "clip.ratio")
    factor = add("Min", [ratio, "clip.one"], "clip.factor")
    clipped = [add("Mul", [g, factor], f"{g}.clipped") for g in gradients]
    add("SequenceConstruct", clipped, clip.output[0])

    kept = list(graph.node)
    del graph.node[:]
    graph.node.extend([*kept[:place], *nodes, *kept[place + 1 :]])
    graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in constants.items())
