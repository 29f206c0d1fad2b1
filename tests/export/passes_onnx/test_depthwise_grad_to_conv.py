import numpy as np
import pytest
import torch
from onnx_graphs import kinds, parsed, run
from torch.nn.functional import conv2d

from edge_dit_export.passes_onnx.depthwise_grad_to_conv import depthwise_grad_to_conv


def gradient(kernel, padding, outputs="dx", group=6, stride=1):
    """A graph of one ConvGrad over [1, 6, 7, 9]; its inputs; PyTorch's gradient."""
    x = torch.randn([1, 6, 7, 9], requires_grad=True)
    weight = torch.randn([6, 6 // group, *kernel])
    y = conv2d(x, weight, padding=padding, groups=group, stride=stride)
    dy = torch.randn(y.shape)
    y.backward(dy)
    model = parsed(f"""
        g (float{list(dy.shape)} dy, float[1, 6, 7, 9] x, float{list(weight.shape)} w)
            => (float[1, 6, 7, 9] dx)
        {{
            {outputs} = com.microsoft.ConvGrad <
                group = {group}, kernel_shape = {list(kernel)}, pads = {[*padding, *padding]},
                strides = {[stride, stride]}, dilations = [1, 1]
            > (dy, x, w)
        }}
    """)
    return model, {"dy": dy, "x": x.detach(), "w": weight}, x.grad.numpy()


@pytest.mark.parametrize(
    ("kernel", "padding"), [((3, 3), (1, 1)), ((5, 3), (2, 0)), ((1, 1), (0, 0))]
)
def test_the_gradient_is_pytorchs(kernel, padding):
    model, feeds, want = gradient(kernel, padding)
    assert kinds(model) == ["ConvGrad"]
    assert depthwise_grad_to_conv(model) == 1
    assert kinds(model) == ["Slice", "Conv"]
    np.testing.assert_allclose(run(model, feeds)[0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"outputs": "dx, dw"}, {"group": 1}, {"stride": 2}, {"padding": (3, 3)}],
    ids=["of the kernel too", "not depthwise", "strided", "padded by more than k - 1"],
)
def test_others_stay(settings):
    model, _, _ = gradient(**{"kernel": (3, 3), "padding": (1, 1), **settings})
    assert depthwise_grad_to_conv(model) == 0
    assert kinds(model) == ["ConvGrad"]
