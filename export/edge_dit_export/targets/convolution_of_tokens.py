"""Let convolutions read and give images whose channels are last, as tokens are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from edge_dit_export.passes._graph import TO_IMAGE, TO_TOKENS, calls, insert, replace

aten: Any = torch.ops.aten

LIBRARY = torch.library.Library("edge_dit", "FRAGMENT")
LIBRARY.define(
    "convolution_of_tokens(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding,"
    " int[] dilation, int groups) -> Tensor"
)


@torch.library.impl(LIBRARY, "convolution_of_tokens", "CompositeImplicitAutograd")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    """[1, H, W, C] -> [1, H, W, O]; the other arguments are aten.convolution's."""
    *settings, groups = arguments
    image = x.permute(TO_IMAGE)
    y = aten.convolution(image, weight, bias, *settings, False, [0, 0], groups)
    return y.permute(TO_TOKENS).contiguous()


CONVOLUTION_OF_TOKENS: Any = torch.ops.edge_dit.convolution_of_tokens.default


def convolution_of_tokens(module: fx.GraphModule) -> int:
    """Write a convolution between permutes of its channels as one call of XNNPACK's own kind:

        x -> permute -> convolution -> permute         x -> convolution_of_tokens

    XNNPACK convolves images with channels last. aten's convolution would be permuted before and
    after, and these permutes undone: four passes over SANA's largest activation.

    Returns:
        Number of convolutions rewritten.
    """
    count = 0
    for node in calls(module, aten.convolution.default):
        arguments: Any = node.args
        x, weight, bias, *settings, transposed, _, groups = arguments
        users = list(node.users)
        if transposed or not _is_permute(x, TO_IMAGE):
            continue
        if not users or not all(_is_permute(user, TO_TOKENS) for user in users):
            continue
        y = insert(node, CONVOLUTION_OF_TOKENS, x.args[0], weight, bias, *settings, groups)
        for user in users:
            replace(user, y)
        node.graph.erase_node(node)
        count += 1
    module.graph.eliminate_dead_code()
    return count


def _is_permute(node: Any, order: list[int]) -> bool:
    return node.target is aten.permute.default and list(node.args[1]) == order
