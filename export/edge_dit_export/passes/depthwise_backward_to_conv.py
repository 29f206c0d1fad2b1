"""The gradient of a depthwise convolution as a convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edge_dit_export.passes._graph import add_buffer, calls, frozen, insert, replace, shape

aten: Any = torch.ops.aten


def depthwise_backward_to_conv(module: fx.GraphModule) -> int:
    """Write the gradient of a frozen depthwise convolution, with respect to its input, as the
    convolution of dy with the kernel turned by 180 degrees:

        dx = dy * flip(w),  padding k - 1 - p        stride 1, kernel k, forward padding p

    The kernel is turned here, once. Neither ONNX (opset 18) nor ExecuTorch 1.5.1 has
    convolution_backward.

    Returns:
        Number of gradients rewritten.
    """
    count = 0
    for node in calls(module, aten.convolution_backward.default):
        dy, x, weight, _bias_sizes, stride, padding, dilation, transposed, _, groups, mask = (
            node.args
        )
        kernel = frozen(module, weight)
        if (
            kernel is None
            or kernel.shape[:2] != (groups, 1)
            or shape(x)[1] != groups
            or list(mask) != [True, False, False]
            or (set(stride), set(dilation), transposed) != ({1}, {1}, False)
        ):
            continue
        turned = add_buffer(
            module, node, f"{weight.target}__turned", kernel.flip(2, 3).contiguous()
        )
        sides = [side - 1 - p for side, p in zip(kernel.shape[2:], padding, strict=True)]
        dx = insert(
            node,
            aten.convolution.default,
            dy,
            turned,
            None,
            [1, 1],
            sides,
            [1, 1],
            False,
            [0, 0],
            groups,
        )
        for item in list(node.users):
            if item.args[1] == 0:
                replace(item, dx)
        module.graph.eliminate_dead_code()
        count += 1
    return count
