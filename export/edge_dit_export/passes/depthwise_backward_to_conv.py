"""Rewrite the gradient of a depthwise convolution as a convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edge_dit_export.passes._graph import add_buffer, calls, frozen, insert, replace, shape

aten: Any = torch.ops.aten


def depthwise_backward_to_conv(module: fx.GraphModule) -> int:
    """Write the gradient of a depthwise convolution, with respect to its input, as the convolution
    of dy with the kernel turned by 180 degrees:

        dx = dy * flip(w),  padding k - 1 - p        stride 1, kernel k, forward padding p

    A frozen kernel is turned here, once; a kernel that is an input is turned in the graph. Neither
    ONNX (opset 18) nor ExecuTorch 1.5.1 has convolution_backward.

    Returns:
        Number of gradients rewritten.
    """
    count = 0
    for node in calls(module, aten.convolution_backward.default):
        dy, x, weight, _bias_sizes, stride, padding, dilation, transposed, _, groups, mask = (
            node.args
        )
        kernel = frozen(module, weight)
        sizes = shape(weight)
        if (
            sizes[:2] != (groups, 1)
            or shape(x)[1] != groups
            or list(mask) != [True, False, False]
            or (set(stride), set(dilation), transposed) != ({1}, {1}, False)
        ):
            continue
        if kernel is None:
            turned = insert(node, aten.flip.default, weight, [2, 3])
        else:
            name = f"{weight.target}__turned"
            turned = add_buffer(module, node, name, kernel.flip(2, 3).contiguous())
        sides = [side - 1 - p for side, p in zip(sizes[2:], padding, strict=True)]
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
