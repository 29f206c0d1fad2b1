"""Delegates single calls of a graph to XNNPACK.

ExecuTorch's own partitioner walks the whole graph once for every layer that it takes, so lowering
time grew with the square of the depth. Here each call becomes a stand-in before the graph is
lowered, and a delegate afterwards, see `edge_dit_export.targets.xnnpack_graph`.

A frozen W serves both directions, and its bytes lie in the program once: x W^T is a linear layer,
dy W a fully connected one with weights marked as transposed.

Only what XNNPACK packs is a constant of a delegate; other frozen tensors and numbers are inputs.
With its cache of packed weights, the default on Android and iOS, executorch 1.5.1 frees a
delegate's constants once it is loaded, and would read them later
(https://github.com/pytorch/executorch/pull/22779).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from executorch.backends.xnnpack.utils.xnnpack_constants import XNN_MAX_TENSOR_DIMS
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir import EdgeCompileConfig
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor, fx
from torch.export import ExportedProgram

from edge_dit.models.quantize import to_int8
from edge_dit_export.graph.flat_program import flat_program
from edge_dit_export.passes._graph import (
    add_buffer,
    calls,
    frozen,
    insert,
    replace,
    shape,
    sweep,
    value,
)
from edge_dit_export.targets.xnnpack_graph import (
    BINARY,
    INT8_PRODUCT,
    LAYERS,
    OPERATIONS,
    Constants,
    DelegateProgram,
)

aten: Any = torch.ops.aten
SMALLEST = 4096
"""Fewest elements in the result of one of `OPERATIONS` that is delegated. The portable kernels are
up to twenty times slower, but a delegate has its own overhead."""
EDGE = EdgeCompileConfig(_check_ir_validity=False)


LIBRARY = torch.library.Library("edge_dit", "FRAGMENT")
# The stand-in of delegate ``index``: it has the shape of its result, and never runs. A custom_op
# would add autograd, which takes a fifth of the time of lowering.
LIBRARY.define("delegated(Tensor[] inputs, int index, int[] result) -> Tensor")


@torch.library.register_fake("edge_dit::delegated", lib=LIBRARY)
def _(inputs: list[Tensor], index: int, result: list[int]) -> Tensor:
    return inputs[0].new_empty(result)


class Delegates:
    """Calls taken out of a graph module, to be put back as delegates.

    Args:
        module: `LAYERS` and `OPERATIONS` in it are replaced by stand-ins, in place; their frozen
            arguments are removed from it.

    Attributes:
        calls: number of calls taken.
        layers: how many of them are products or convolutions with a frozen weight.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._constants = Constants()
        self._originals: dict[object, ExportedProgram] = {}
        self._lowered: list[LoweredBackendModule] = []
        self._shared: dict[object, int] = {}
        self.calls = self.layers = 0
        for call in calls(module, *LAYERS, *OPERATIONS):
            if not _is_taken(module, call):
                continue
            tensors = _packed_arguments(module, call)
            _numbers_to_inputs(module, call)
            index, inputs = self._lower(call, tensors)
            arguments = (inputs, index, list(shape(call)))
            replace(call, insert(call, torch.ops.edge_dit.delegated.default, *arguments))
            self.calls += 1
            self.layers += call.target in (*LAYERS, aten.mm.default) and bool(tensors)
        sweep(module)

    def _lower(self, call: fx.Node, tensors: dict[int, Tensor]) -> tuple[int, list[fx.Node]]:
        """Number of a call's delegate, and its inputs. Equal calls without weights share one."""
        program = DelegateProgram(call, tensors, self._constants)
        arguments = (shape(a) if isinstance(a, fx.Node) else str(a) for a in call.args)
        key = (call.target, *arguments)
        if not tensors and key in self._shared:
            return self._shared[key], program.inputs
        lowered = LoweredBackendModule(
            edge_program=self._original(program.inputs, call),
            backend_id=XnnpackBackend.__name__,
            processed_bytes=program.serialize(),
            compile_specs=[],
            named_data_store_output=program.named_data(),
        )
        lowered.meta = {"debug_handle_map": {}}
        self._lowered.append(lowered)
        index = len(self._lowered) - 1
        if not tensors:
            self._shared[key] = index
        return index, program.inputs

    def _original(self, inputs: list[fx.Node], call: fx.Node) -> ExportedProgram:
        key = (*map(shape, inputs), shape(call))
        if key not in self._originals:
            self._originals[key] = _original(inputs, call)
        return self._originals[key]

    def put_back(self, program: ExportedProgram) -> None:
        """Replace the stand-ins in a lowered graph by the delegates, in place."""
        module = program.graph_module
        for index, lowered in enumerate(self._lowered):
            module.add_submodule(f"delegate_{index}", lowered)
        for node in list(module.graph.nodes):
            # Lowering wraps operations in an EdgeOpOverload, which keeps the original.
            if getattr(node.target, "_op", None) is not torch.ops.edge_dit.delegated.default:
                continue
            inputs, index, _ = node.args
            with module.graph.inserting_before(node):
                lowered = module.graph.get_attr(f"delegate_{index}")
                call = module.graph.call_function(executorch_call_delegate, (lowered, *inputs))
                result = module.graph.call_function(operator.getitem, (call, 0))
            call.meta["val"] = (value(node),)
            result.meta["val"] = value(node)
            replace(node, result)
        module.recompile()


def _original(inputs: list[fx.Node], call: fx.Node) -> ExportedProgram:
    """What ExecuTorch reads of a delegate's original: a program with a result of its shape."""
    graph = fx.Graph()
    for number, node in enumerate(inputs):
        graph.placeholder(f"input_{number}").meta["val"] = value(node)
    result = graph.call_function(aten.full.default, (shape(call), 0.0))
    result.meta["val"] = value(call)
    graph.output((result,))
    examples = (torch.zeros(shape(node)) for node in inputs)
    return flat_program(fx.GraphModule({}, graph), examples)


def _is_taken(module: fx.GraphModule, call: fx.Node) -> bool:
    tensors = [argument for argument in call.args if isinstance(argument, fx.Node)]
    if call.kwargs or any(value(tensor).dtype != torch.float32 for tensor in [call, *tensors]):
        return False
    if any(len(shape(tensor)) > XNN_MAX_TENSOR_DIMS for tensor in [call, *tensors]):
        return False
    if call.target is aten._softmax.default and call.args[1] not in (-1, len(shape(call)) - 1):
        return False  # XNNPACK's is over the last dimension
    if call.target is aten.convolution.default and (call.args[6] or len(shape(call)) != 4):
        return False  # transposed, or not of images
    constant = [frozen(module, tensor) is not None for tensor in tensors]
    if call.target in LAYERS or (call.target is aten.mm.default and constant[1]):
        return not constant[0] and all(constant[1:])
    numbers = [a for a in call.args if call.target in BINARY and not isinstance(a, fx.Node)]
    return (
        value(call).numel() >= SMALLEST
        and all(isinstance(number, float) for number in numbers)
        and not (any(constant) if call.target not in BINARY else all(constant))
    )


def _packed_arguments(module: fx.GraphModule, call: fx.Node) -> dict[int, Tensor]:
    """The frozen tensors that XNNPACK packs for a call, by position."""
    return {
        position: tensor
        for position, argument in enumerate(call.args)
        if call.target in (*LAYERS, aten.mm.default)
        and isinstance(argument, fx.Node)
        and (tensor := frozen(module, argument)) is not None
    }


def _numbers_to_inputs(module: fx.GraphModule, call: fx.Node) -> None:
    """Let a call read its numbers from buffers; an int8 product that goes back its scale too."""
    if call.target in BINARY:
        call.args = tuple(
            _number(module, call, argument) if isinstance(argument, float) else argument
            for argument in call.args
        )
    elif call.target is INT8_PRODUCT and call.args[2]:
        weight: Any = call.args[1]
        _, scale = to_int8(getattr(module, weight.target))
        call.args = (*call.args, add_buffer(module, call, f"{weight.target}__scale", scale))


def _number(module: fx.GraphModule, before: fx.Node, number: float) -> fx.Node:
    tensor = torch.tensor([number])
    name = f"number_{tensor.numpy().tobytes().hex()}"
    return add_buffer(module, before, name, tensor)
