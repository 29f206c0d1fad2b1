import itertools

import numpy as np
import pytest
import torch
from onnx_graphs import kinds, parsed, run

from edge_dit_export.passes_onnx.expand_clip_grad_norm import expand_clip_grad_norm

MAX_NORM = 0.5


def clipping():
    """A graph that clips three gradients with standard operators."""
    model = parsed(f"""
        clip (seq(float[]) gradients) => (seq(float[]) clipped)
        {{ clipped = com.microsoft.InplaceClipGradNorm <max_norm = {MAX_NORM}> (gradients) }}
    """)
    assert kinds(model) == ["InplaceClipGradNorm"]
    expand_clip_grad_norm(model, 3)
    assert kinds(model)[-1] == "SequenceConstruct"
    assert {node.domain for node in model.graph} == {""}
    return model


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_equals_torch_and_does_not_depend_on_the_order(scale):
    rng = np.random.default_rng(0)
    shapes = ((4, 32), (32, 4), (7, 3))
    gradients = [(scale * rng.standard_normal(shape)).astype(np.float32) for shape in shapes]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.from_numpy(gradient.copy())
    torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
    model = clipping()
    first = run(model, {"gradients": gradients})[0]
    for parameter, value in zip(parameters, first, strict=True):
        np.testing.assert_allclose(value, parameter.grad.numpy(), rtol=1e-6)
    for order in itertools.permutations(range(3)):
        again = run(model, {"gradients": [gradients[i] for i in order]})[0]
        for i, value in zip(order, again, strict=True):
            np.testing.assert_array_equal(value, first[i])
