"""Frozen layers of a graph as XNNPACK delegates, one by one.

ExecuTorch's own partitioner goes over the whole graph once for every layer it takes: lowering grew
with the square of the depth. Here each frozen layer becomes a stand-in without weights before the
graph is lowered, and a delegate afterwards; a delegate's program is made once per kind of layer
and only its weights are exchanged.

A frozen W serves both directions, and its bytes lie in the program once: x W^T is a linear layer,
dy W a fully connected one with weights marked as transposed, which is what addmm becomes.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir import EdgeCompileConfig, to_edge
from executorch.exir.backend.backend_api import to_backend
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.delegate import executorch_call_delegate
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from edge_dit_export.passes._graph import calls, frozen, insert, replace, shape, sweep, value

aten: Any = torch.ops.aten
PRODUCTS = (aten.linear.default, aten.mm.default)
LAYERS = (*PRODUCTS, aten.convolution.default)
EDGE = EdgeCompileConfig(_check_ir_validity=False, preserve_ops=[aten.linear.default])
"""linear is no core ATen operation; the delegate wants it whole."""
LINEAR_ONLY = CompileSpec("dqlinear_partitioner", b"")
"""Tells XNNPACK's preprocess that a program is a linear layer: one pass over it, not 17."""
BIAS = "bias"


@torch.library.custom_op("edge_dit::frozen_layer", mutates_args=())
def frozen_layer(x: Tensor, index: int, result: list[int]) -> Tensor:
    """Keeps the place of layer ``index``, of whose result only the shape is known."""
    raise NotImplementedError("a stand-in, replaced before anything runs")


@frozen_layer.register_fake
def _(x: Tensor, index: int, result: list[int]) -> Tensor:
    return x.new_empty(result)


class _Layer(nn.Module):
    """One call with its frozen tensors as buffers, and its input as the argument.

    mm(x, W) is written as addmm(b, x, W), for that has a visitor. b is -0.0, with which a sum stays
    what it was; and as no layer has such a bias, what XNNPACK packs of W for mm is not taken for
    what it packs of the same W and a bias of zeros for linear, should it cache that by name.
    """

    def __init__(self, call: fx.Node, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.call: Any = call.target
        self.arguments = call.args[1:]
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """The layer on ``x``, as the tuple that a delegate returns."""
        buffers: Any = (
            getattr(self, _buffer(i)) if isinstance(argument, fx.Node) else argument
            for i, argument in enumerate(self.arguments, start=1)
        )
        if self.call is aten.mm.default:
            return (torch.addmm(getattr(self, BIAS), x, *buffers),)
        return (self.call(x, *buffers),)


def _buffer(position: int) -> str:
    return f"argument_{position}"


class FrozenLayers:
    """The frozen layers taken out of a graph module, to be put back as delegates.

    Args:
        module: linear layers and convolutions in it whose weights are frozen are replaced by
            stand-ins, in place; their weights leave it.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._templates: dict[object, ExportedProgram] = {}
        self._delegates = []
        for call in calls(module, *LAYERS):
            tensors = _frozen_arguments(module, call)
            if tensors is None:
                continue
            index = len(self._delegates)
            self._delegates.append(self._lower(call, tensors))
            arguments = (call.args[0], index, list(shape(call)))
            replace(call, insert(call, torch.ops.edge_dit.frozen_layer.default, *arguments))
        sweep(module)

    def __len__(self) -> int:
        return len(self._delegates)

    def _lower(self, call: fx.Node, tensors: dict[str, Tensor]) -> Any:
        key = (
            str(call.target),
            shape(call.args[0]),  # type: ignore[arg-type]
            *(shape(a) if isinstance(a, fx.Node) else str(a) for a in call.args[1:]),
        )
        if key not in self._templates:
            example = torch.zeros(shape(call.args[0]))  # type: ignore[arg-type]
            program = torch.export.export(_Layer(call, tensors), (example,))
            self._templates[key] = to_edge(program, compile_config=EDGE).exported_program()
        specs = [LINEAR_ONLY] if call.target in PRODUCTS else []
        return to_backend(
            XnnpackBackend.__name__, _with_weights(self._templates[key], tensors), specs
        )

    def put_back(self, program: ExportedProgram) -> None:
        """Replace the stand-ins in a lowered graph by the layers' delegates, in place."""
        module = program.graph_module
        for node in list(module.graph.nodes):
            # Lowering wraps operations in an EdgeOpOverload, which keeps the original.
            if getattr(node.target, "_op", None) is not torch.ops.edge_dit.frozen_layer.default:
                continue
            x, index, _ = node.args
            name = f"frozen_layer_{index}"
            module.add_submodule(name, self._delegates[index])
            with module.graph.inserting_before(node):
                layer = module.graph.get_attr(name)
                call = module.graph.call_function(executorch_call_delegate, (layer, x))
                result = module.graph.call_function(operator.getitem, (call, 0))
            call.meta["val"] = (value(node),)
            result.meta["val"] = value(node)
            replace(node, result)
        module.recompile()


def _frozen_arguments(module: fx.GraphModule, call: fx.Node) -> dict[str, Tensor] | None:
    """A call's tensors other than its input, by `_buffer` and `BIAS`; None if one is not frozen."""
    tensors = {}
    for position, argument in enumerate(call.args[1:], start=1):
        if isinstance(argument, fx.Node):
            tensor = frozen(module, argument)
            if tensor is None:
                return None
            tensors[_buffer(position)] = tensor
    if call.target is aten.mm.default:
        tensors[BIAS] = torch.full((shape(call)[1],), -0.0)
    return tensors


def _with_weights(template: ExportedProgram, tensors: dict[str, Tensor]) -> ExportedProgram:
    """The same program with other buffers."""
    return ExportedProgram(
        root=template.graph_module,
        graph=template.graph,
        graph_signature=template.graph_signature,
        state_dict=dict(tensors),
        range_constraints=template.range_constraints,
        module_call_graph=template.module_call_graph,
        constants=template.constants,
        verifiers=[template.verifier],
    )
