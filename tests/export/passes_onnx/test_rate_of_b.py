import itertools

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_graphs import kinds, parsed, run
from onnxruntime.capi import _pybind_state

from edge_dit_export.passes_onnx.rate_of_b import rate_of_b

pytestmark = pytest.mark.skipif(
    not hasattr(_pybind_state, "CheckpointState"), reason="stock onnxruntime, no training"
)
RANK, RATIO, LR, DECAY = 2, 8.0, 1e-2, 0.1
SHAPES = ((RANK, 5), (4, RANK), (RANK, 3, 1, 1), (1, RANK))
"""A, B, A, B."""
SEQUENCES = ("params", "gradients", "first", "second")


def optimizer() -> ir.Model:
    """AdamW over four tensors."""
    numbers = "".join(f"at_{i} = Constant <value_int = {i}> ()\n" for i in range(4))
    split = "".join(f"g_{i} = SequenceAt (gradients, at_{i})\n" for i in range(4))
    sequences = ", ".join(f"seq(float[]) {name}" for name in SEQUENCES)
    return parsed(f"""
        optimizer (float[1] lr, int64[1] step, {sequences}) => (bool[1] flag)
        {{ {numbers} {split}
           joined = SequenceConstruct (g_0, g_1, g_2, g_3)
           flag = com.microsoft.AdamWOptimizer <alpha = 0.9, beta = 0.999, epsilon = 1e-6,
              weight_decay = {DECAY}, adam_mode = 0, correct_bias = 1>
              (lr, step, params, joined, first, second) }}
    """)


def reading_after(model: ir.Model) -> ir.Model:
    """The model, with outputs that show the parameters, flat, after the update."""
    graph = model.graph
    params = next(value for value in graph.inputs if value.name == "params")

    def flat(name: str) -> ir.Value:
        return ir.val(name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None]))

    then, never = ir.tape.Tape(), ir.tape.Tape()
    read, unread = [], []
    every = then.op("Constant", [], {"value_ints": [-1]}, output=ir.val("read_every"))
    for index in range(len(SHAPES)):
        at = then.op("Constant", [], {"value_int": index}, output=ir.val(f"read_at_{index}"))
        one = then.op("SequenceAt", [params, at], output=ir.val(f"read_one_{index}"))
        read.append(then.op("Reshape", [one, every], output=flat(f"read_{index}")))
        nothing = {"value_floats": [0.0]}
        unread.append(never.op("Constant", [], nothing, output=flat(f"unread_{index}")))
    branches = {
        "then_branch": ir.Graph([], read, nodes=then.nodes, name="read"),
        "else_branch": ir.Graph([], unread, nodes=never.nodes, name="unread"),
    }
    outputs = [flat(f"after_{index}") for index in range(len(SHAPES))]
    ir.tape.Tape(graph).op_multi_out("If", [graph.outputs[0]], branches, outputs=outputs)
    graph.outputs.extend(outputs)
    return model


def test_only_one_optimizer_is_left_in_the_graph_itself():
    model = optimizer()
    rate_of_b(model, RANK, RATIO)
    assert kinds(model).count("AdamWOptimizer") == 1
    assert kinds(model)[-1] == "If"


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))])
def test_equals_torch_in_any_order(order):
    rng = np.random.default_rng(0)
    params, gradients = (
        [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES] for _ in range(2)
    )
    parameters = [torch.nn.Parameter(torch.from_numpy(value.copy())) for value in params]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.from_numpy(gradient)
    a, b = parameters[::2], parameters[1::2]
    groups = [{"params": a, "lr": LR}, {"params": b, "lr": LR * RATIO}]
    torch.optim.AdamW(groups, eps=1e-6, weight_decay=DECAY).step()

    model = optimizer()
    rate_of_b(model, RANK, RATIO)
    zeros = [np.zeros_like(value) for value in params]
    given = dict(zip(SEQUENCES, (params, gradients, zeros, zeros), strict=True))
    feeds = {name: [values[i].copy() for i in order] for name, values in given.items()}
    scalars = {"lr": np.array([LR], np.float32), "step": np.array([1], np.int64)}
    flag, *after = run(reading_after(model), {**scalars, **feeds})
    assert flag == [True]
    for index, value in zip(order, after, strict=True):
        expected = parameters[index].detach().numpy().ravel()
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        assert not np.array_equal(value, params[index].ravel())
