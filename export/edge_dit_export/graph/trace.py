"""A function of tensors -> one flat core ATen graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen
from torch.nn.attention import SDPBackend, sdpa_kernel

from edge_dit.models.families.family import Family


@dataclass(frozen=True)
class TracedStep:
    """A traced computation, with names for its inputs and outputs.

    Attributes:
        module: flat positional inputs, flat tuple of outputs; constants are buffers.
        inputs: example value of every input by name, in the order of the placeholders.
        outputs: names in order.
    """

    module: fx.GraphModule
    inputs: dict[str, Tensor]
    outputs: list[str]


def trace(
    function: Callable[[dict[str, Tensor]], Any],
    inputs: Mapping[str, Tensor],
    family: Family | None = None,
    compute: bool = False,
) -> fx.GraphModule:
    """Trace ``function(inputs)``, including the autograd calls in it.

    Every input becomes a placeholder, in order; the outputs are a flat tuple.

    Without ``compute`` nothing is computed, so inputs may be views of files larger than memory.
    Attention is traced in its math form: the fused kernels' backward exists in no runtime we export
    to (pytorch/executorch issue 12804).

    Args:
        function: takes the tensors by name, returns a tensor or a tuple of tensors.
        inputs: examples; only shapes and dtypes matter.
        family: of the model in ``function``; while tracing it keeps to operations that every target
            has (`Family.traceable`).
        compute: compute the function on the examples. Tensors that are no inputs are then allowed,
            and become constants.

    Raises:
        NotImplementedError: the function changes a tensor in place that something else reads.
    """
    table: Any = core_aten_decompositions()

    def plain(tensors: dict[str, Tensor]) -> Any:  # make_fx would take a method's self for an input
        return function(tensors)

    seen: set[int] = set()
    examples = {}
    for name, tensor in inputs.items():
        # The tracer would merge two inputs that are the same tensor.
        examples[name] = torch.empty_like(tensor) if id(tensor) in seen else tensor
        seen.add(id(tensor))
    with sdpa_kernel(SDPBackend.MATH), family.traceable() if family else nullcontext():
        # Of what is computed, much runs once: it may write into slices of a tensor.
        traced = functionalize(plain, remove="mutations") if compute else plain
        mode = "real" if compute else "fake"
        module = make_fx(traced, decomposition_table=table, tracing_mode=mode)(examples)
    module.graph.set_codegen(CodeGen())
    _make_functional(module.graph)
    module.recompile()
    return module


def _make_functional(graph: fx.Graph) -> None:
    """Replace calls that change a tensor in place, as in torch's RMSNorm, by calls that do not."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        name, overload = schema.name.removesuffix("_"), schema.overload_name or "default"
        operator = getattr(torch.ops.aten, name.removeprefix("aten::"), None)
        if operator is None or not _only_reader(node):
            raise NotImplementedError(f"{node.target} of a tensor with other users")
        node.target = getattr(operator, overload)


def _only_reader(node: fx.Node) -> bool:
    """Whether nothing else reads the tensor that a call changes, or what that is a view of."""
    changed: Any = node.args[0]
    while list(changed.users) == [node]:
        schema = getattr(changed.target, "_schema", None)
        if schema is None or not any(one.alias_info for one in schema.returns):
            return True
        node, changed = changed, changed.args[0]
    return False
