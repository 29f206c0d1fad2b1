import itertools

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, checker, helper

from edge_dit_export.passes_onnx.expand_clip_grad_norm import expand_clip_grad_norm

MAX_NORM = 0.5


def clipping():
    def sequence(name):
        return helper.make_tensor_sequence_value_info(name, TensorProto.FLOAT, None)

    node = helper.make_node(
        "InplaceClipGradNorm", ["gradients"], ["clipped"], domain="com.microsoft", max_norm=MAX_NORM
    )
    graph = helper.make_graph([node], "clip", [sequence("gradients")], [sequence("clipped")])
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    expand_clip_grad_norm(model, 3)
    checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_equals_torch_and_does_not_depend_on_the_order(scale):
    rng = np.random.default_rng(0)
    shapes = ((4, 32), (32, 4), (7, 3))
    gradients = [(scale * rng.standard_normal(shape)).astype(np.float32) for shape in shapes]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.from_numpy(gradient.copy())
    torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
    session = clipping()
    first = session.run(None, {"gradients": gradients})[0]
    for parameter, value in zip(parameters, first, strict=True):
        np.testing.assert_allclose(value, parameter.grad.numpy(), rtol=1e-6)
    for order in itertools.permutations(range(3)):
        again = session.run(None, {"gradients": [gradients[i] for i in order]})[0]
        for i, value in zip(order, again, strict=True):
            np.testing.assert_array_equal(value, first[i])
