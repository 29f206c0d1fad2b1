"""Calls whose arguments are all constants -> their results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg


@torch.no_grad()
def fold_constants(module: fx.GraphModule) -> int:
    """Compute calls that depend on no input, such as those that make tables of positions, in place.

    torch computes them here once, to the same bits as in the model. What it computes may have a
    dtype that no target has, as long as nothing else reads that.

    Returns:
        Number of calls removed.
    """
    graph = module.graph
    known: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            known[node] = getattr(module, str(node.target))
        elif node.op == "call_function" and all(n in known for n in node.all_input_nodes):
            arguments, options = map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*arguments, **options)  # type: ignore[operator]
    count = 0
    for node, value in known.items():
        if node.op != "call_function":
            continue
        count += 1
        if isinstance(value, Tensor) and any(user not in known for user in node.users):
            name = f"folded_{node.name}"
            module.register_buffer(name, value.detach().clone().contiguous())
            with graph.inserting_before(node):
                constant = graph.get_attr(name)
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
    for node in reversed([*known]):
        if not node.users:
            graph.erase_node(node)
    module.recompile()
    return count
