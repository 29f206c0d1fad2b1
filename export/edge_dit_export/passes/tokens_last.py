"""Compute between convolutions on tokens, not on images."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edge_dit_export.passes._graph import (
    TO_IMAGE,
    calls,
    image_of,
    insert,
    replace_with_image,
    shape,
    tokens_of,
    value,
)

aten: Any = torch.ops.aten
ALONG = {
    aten.slice.Tensor: 1,
    aten.cat.default: 1,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
}
"""Operations along an axis -> place of the axis among their arguments."""
CHANNELS = 1
"""The channels' axis, in images [1, C, H, W] and in tokens [H W, C]."""


def tokens_last(module: fx.GraphModule) -> int:
    """Let what is computed from images [1, C, H, W] be computed from tokens [H W, C], up to the
    next convolution:

        image(x) -> sigmoid -> ...         x -> sigmoid -> ... -> image

    Around the 1x1 convolutions of SANA's feed-forward, which are products of tokens
    (`conv1x1_to_mm`), the changes from tokens to images and back then meet and cancel
    (`merge_shape_ops`). Those next to the depthwise convolution stay; onnxruntime joins them to the
    reordering that it does there anyway.

    Returns:
        Number of operations moved.
    """
    for convolution in calls(module, aten.convolution.default):
        if shape(convolution)[0] == 1 and len(shape(convolution)) == 4:
            _by_way_of_tokens(convolution)
    return sum(
        _move(node)
        for node in list(module.graph.nodes)
        if node.op == "call_function"
        and any(_source(argument) is not None for argument in node.all_input_nodes)
    )


def _by_way_of_tokens(convolution: fx.Node) -> None:
    """Let the users of a convolution read an image that is made of tokens."""
    after, users = convolution.next, list(convolution.users)
    image = image_of(after, tokens_of(after, convolution), shape(convolution)[2:])
    for user in users:
        user.replace_input_with(convolution, image)


def _source(node: fx.Node) -> fx.Node | None:
    """The tokens that a node is the image of."""
    if node.target is not aten.permute.default or list(node.args[1]) != TO_IMAGE:  # type: ignore[call-overload]
        return None
    view: Any = node.args[0]
    tokens = view.args[0] if view.target is aten.view.default else None
    one = tokens is not None and len(shape(tokens)) == 2 and shape(view)[0] == 1
    return tokens if one and shape(tokens)[1] == shape(view)[3] else None


def _move(node: fx.Node) -> int:
    """Compute ``node`` from tokens, if it can be."""
    target: Any = node.target
    arguments: list[Any] = list(node.args)
    images = [argument for argument in node.all_input_nodes if value(argument).dim() > 0]
    sides = shape(images[0])[2:]
    if any(len(shape(image)) != 4 or shape(image)[2:] != sides for image in images):
        return 0
    if target in ALONG:
        place = ALONG[target]
        if place >= len(arguments) or arguments[place] % 4 != CHANNELS:
            return 0
        arguments[place] = CHANNELS
    elif target is aten.constant_pad_nd.default:
        if any(arguments[1][:4]) or any(arguments[1][6:]):
            return 0
        arguments[1] = arguments[1][4:6]
    elif torch.Tag.pointwise not in getattr(target, "tags", ()):
        return 0

    def tokens(argument: fx.Node) -> fx.Node:
        if argument not in images:
            return argument
        return _source(argument) or tokens_of(node, argument)

    moved = insert(node, target, *fx.map_arg(arguments, tokens), **fx.map_arg(node.kwargs, tokens))
    if isinstance(value(moved), (tuple, list)):
        for item in list(node.users):
            part = insert(item, item.target, moved, *item.args[1:])
            replace_with_image(item, image_of(part.next, part, sides))
        node.graph.erase_node(node)
    else:
        replace_with_image(node, image_of(node, moved, sides))
    return 1
