"""AdamWOptimizer over all LoRA tensors -> one over A and one over B, with a learning rate each.

onnxruntime-training's operator takes one rate for a sequence of parameters, and the order of that
sequence changes from session to session (see `expand_clip_grad_norm`). So the graph tells A from B
by the first dimension, which is the rank for A alone. It takes the other kind out of each sequence
with SequenceErase, which copies no tensor: the operator goes on writing over the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from edge_dit_export.passes_onnx._graph import constant


def rate_of_b(model: ir.Model, rank: int, ratio: float) -> None:
    """Rewrite the AdamWOptimizer of an optimizer_model.onnx, in place. There are as many A as B.

    Args:
        model: its gradients come out of a SequenceConstruct.
        rank: rows of every A, and of no B.
        ratio: learning rate of B over that of A.
    """
    graph = model.graph
    adamw = next(node for node in graph if node.op_type == "AdamWOptimizer")
    rate, step, parameters, gradients, *moments = adamw.inputs
    made = gradients.producer() if gradients else None
    assert made is not None
    assert made.op_type == "SequenceConstruct"
    tape = ir.tape.Tape()
    rows = [tape.op("Shape", [gradient], {"start": 0, "end": 1}) for gradient in made.inputs]
    is_a = tape.op("Equal", [tape.op("Concat", rows, {"axis": 0}), constant(graph, [rank])])
    flat = constant(graph, [-1])
    of_a, of_b = (
        tape.op("Reshape", [tape.op("NonZero", [kind]), flat])
        for kind in (is_a, tape.op("Not", [is_a]))
    )
    # Backwards: erasing moves what comes after.
    numbers = [constant(graph, np.array(n, np.int64)) for n in reversed(range(len(rows) // 2))]

    def without(sequences: Iterable[ir.Value | None], places: ir.Value) -> list[ir.Value | None]:
        left = []
        for sequence in sequences:
            for number in numbers:
                at = tape.op("Gather", [places, number])
                sequence = tape.op("SequenceErase", [sequence, at])
            left.append(sequence)
        return left

    for index, value in enumerate(without((parameters, gradients, *moments), of_b), 2):
        adamw.replace_input_with(index, value)
    faster = tape.op("Mul", [rate, constant(graph, np.array([ratio], np.float32))])
    sequences = without((parameters, gradients, *moments), of_a)
    graph.insert_before(adamw, tape.nodes)
    flag = _update_if(adamw, [faster, step, *sequences])
    graph.outputs[graph.outputs.index(adamw.outputs[0])] = flag


def _update_if(adamw: ir.Node, inputs: list[ir.Value | None]) -> ir.Value:
    """Whether ``adamw`` and another such node, with other inputs, have updated, bool [1].

    onnxruntime-training refuses a graph with two of these nodes; it does not look into sub-graphs.
    """
    second, never = ir.tape.Tape(), ir.tape.Tape()
    # Each tape numbers its values from 0, but a sub-graph may not repeat a name.
    updated, not_updated = ir.val("rate_of_b.updated"), ir.val("rate_of_b.not_updated")
    second.op(adamw.op_type, inputs, adamw.attributes, domain=adamw.domain, output=updated)
    never.op("Constant", [], {"value": ir.tensor(np.zeros(1, bool))}, output=not_updated)
    branches = {
        "then_branch": ir.Graph([], [updated], nodes=second.nodes, name="update_b"),
        "else_branch": ir.Graph([], [not_updated], nodes=never.nodes, name="update_nothing"),
    }
    tape = ir.tape.Tape()
    flag = tape.op("If", [adamw.outputs[0]], branches)
    for value in (updated, not_updated, flag):
        value.type, value.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([1])
    assert isinstance(adamw.graph, ir.Graph)
    adamw.graph.insert_after(adamw, tape.nodes)
    return flag
