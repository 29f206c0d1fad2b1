import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn.functional import conv2d

from edge_dit_export.passes_onnx.depthwise_grad_to_conv import depthwise_grad_to_conv


def gradient(kernel, padding, outputs=("dx", "", ""), group=6, stride=1):
    """A graph of one ConvGrad over [1, 6, 7, 9]."""
    shapes = {"dy": None, "x": [1, 6, 7, 9], "w": [6, 6 // group, *kernel]}
    x, weight = torch.randn(shapes["x"], requires_grad=True), torch.randn(shapes["w"])
    y = conv2d(x, weight, padding=padding, groups=group, stride=stride)
    dy = torch.randn(y.shape)
    y.backward(dy)
    shapes["dy"] = list(y.shape)
    node = helper.make_node(
        "ConvGrad",
        ["dy", "x", "w"],
        list(outputs),
        "grad",
        domain="com.microsoft",
        group=group,
        kernel_shape=list(kernel),
        pads=[*padding, *padding],
        strides=[stride, stride],
        dilations=[1, 1],
    )
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "g",
        [value(n, TensorProto.FLOAT, s) for n, s in shapes.items()],
        [value("dx", TensorProto.FLOAT, shapes["x"])],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    feeds = {"dy": dy.numpy(), "x": x.detach().numpy(), "w": weight.numpy()}
    return model, feeds, x.grad.numpy()


@pytest.mark.parametrize(
    ("kernel", "padding"), [((3, 3), (1, 1)), ((5, 3), (2, 0)), ((1, 1), (0, 0))]
)
def test_the_gradient_is_pytorchs(kernel, padding):
    model, feeds, want = gradient(kernel, padding)
    assert depthwise_grad_to_conv(model) == 1
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    have = session.run(None, {n: feeds[n] for n in ("dy", "x", "w")})[0]
    np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"outputs": ("dx", "dw", "")}, {"group": 1}, {"stride": 2}],
    ids=["of the kernel too", "not depthwise", "strided"],
)
def test_others_stay(settings):
    model, _, _ = gradient((3, 3), (1, 1), **settings)
    assert depthwise_grad_to_conv(model) == 0
    assert [node.op_type for node in model.graph.node] == ["ConvGrad"]
