"""What the rewrites share: they find calls, and add nodes with their shape in meta["val"]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

aten: Any = torch.ops.aten
TO_TOKENS, TO_IMAGE = [0, 2, 3, 1], [0, 3, 1, 2]
"""Permutations of an image [1, C, H, W] to [1, H, W, C], and back."""


def tokens_of(before: fx.Node, image: fx.Node) -> fx.Node:
    """An image [1, C, H, W] as tokens [H W, C]."""
    _, channels, rows, columns = shape(image)
    last = insert(before, aten.permute.default, image, TO_TOKENS)
    return insert(before, aten.view.default, last, [rows * columns, channels])


def image_of(before: fx.Node, tokens: fx.Node, sides: Sequence[int]) -> fx.Node:
    """Tokens [H W, C] as an image [1, C, H, W] of sides (H, W)."""
    last = insert(before, aten.view.default, tokens, [1, *sides, shape(tokens)[1]])
    return insert(before, aten.permute.default, last, TO_IMAGE)


def calls(module: fx.GraphModule, *targets: Any) -> list[fx.Node]:
    """The graph's calls of ``targets``, in order."""
    return [n for n in module.graph.nodes if n.op == "call_function" and n.target in targets]


def value(node: fx.Node) -> Any:
    """The fake tensor (or tuple of them) a node yields."""
    return node.meta["val"]


def shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's tensor."""
    return tuple(value(node).shape)


def fake_mode(module: fx.GraphModule) -> FakeTensorMode:
    """The mode that the graph was traced in."""
    return next(value(n).fake_mode for n in module.graph.nodes if n.op == "placeholder")


def insert(before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add a call in front of ``before``, with meta["val"] set.

    Raises:
        RuntimeError, ValueError: as ``target`` itself would raise; nothing was added then.
    """
    example = fx.map_arg((args, kwargs), value)
    mode = next(iter(_tensors(example)), value(before)).fake_mode
    with mode:
        result = target(*example[0], **example[1])
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    node.meta["val"] = result
    return node


def _tensors(tree: Any) -> list[Any]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [t for item in tree.values() for t in _tensors(item)]
    return [t for item in tree for t in _tensors(item)] if isinstance(tree, (list, tuple)) else []


def frozen(module: fx.GraphModule, node: Any) -> Tensor | None:
    """The buffer a node reads, or None for any other node."""
    if isinstance(node, fx.Node) and node.op == "get_attr":
        return getattr(module, str(node.target))
    return None


def add_buffer(module: fx.GraphModule, before: fx.Node, name: str, tensor: Tensor) -> fx.Node:
    """Register ``tensor`` and read it in front of ``before``; a buffer of that name is reused."""
    if not hasattr(module, name):
        module.register_buffer(name, tensor)
    with before.graph.inserting_before(before):
        node = before.graph.get_attr(name)
    node.meta["val"] = fake_mode(module).from_tensor(tensor)
    return node


def replace(node: fx.Node, replacement: fx.Node) -> None:
    """Let every user of ``node`` use ``replacement``, and erase ``node``."""
    node.replace_all_uses_with(replacement)
    node.graph.erase_node(node)


def replace_with_image(node: fx.Node, image: fx.Node) -> None:
    """`replace` by an `image_of` tokens. Its elements lie in another order in memory; a user that
    views ``node`` in a way that this order does not allow gets a copy.
    """
    strided = value(image)
    for user in list(node.users):
        given = image
        if user.target is aten.view.default:
            try:
                torch.empty_strided(strided.shape, strided.stride(), device="meta").view(
                    user.args[1]  # type: ignore[arg-type]
                )
            except RuntimeError:
                plain = {"memory_format": torch.contiguous_format}
                given = insert(user, aten.clone.default, image, **plain)
        user.replace_input_with(node, given)
    node.graph.erase_node(node)


def sweep(module: fx.GraphModule) -> None:
    """Erase what nothing uses any more, buffers included, and recompile."""
    module.graph.eliminate_dead_code()
    read = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for name in [name for name, _ in module.named_buffers() if name not in read]:
        delattr(module, name)
    module.recompile()


def rehome(module: fx.GraphModule) -> None:
    """Move every meta["val"] to one new fake tensor mode (in a copied graph each has its own)."""
    mode = FakeTensorMode()

    def move(old: Any) -> Any:
        if isinstance(old, Tensor):
            return torch.empty_strided(old.shape, old.stride(), dtype=old.dtype)
        return type(old)(map(move, old)) if isinstance(old, (list, tuple)) else old

    with mode:
        for node in module.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = move(node.meta["val"])


def propagate(module: fx.GraphModule) -> None:
    """Compute every call's meta["val"] from its arguments'.

    Raises:
        RuntimeError, ValueError: a call that torch would refuse.
    """
    with fake_mode(module), torch.no_grad():
        for node in module.graph.nodes:
            if node.op != "call_function":
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            node.meta["val"] = node.target(*args, **kwargs)
