"""A traced graph -> an exported program, without another trace.

``torch.export``, and the decomposition that every exporter asks for, would trace the module several
times. That takes two thirds of an export's time and changes nothing in a graph that
`edge_dit_export.graph.trace` made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram, ExportGraphSignature, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils._pytree import tree_structure


class _Flat(ExportedProgram):
    """A program of core ATen calls: nothing in it needs decomposing, and nobody changes it."""

    _module: fx.GraphModule | None = None

    def run_decompositions(
        self, decomp_table: Any = None, decompose_custom_triton_ops: bool = False
    ) -> ExportedProgram:
        return self

    def module(self, check_guards: bool = True) -> fx.GraphModule:
        # In every pass ExecuTorch asks for a delegate's module at each call of the delegate.
        if self._module is None:
            self._module = super().module(check_guards)
        return self._module


def flat_program(module: fx.GraphModule, inputs: Iterable[Tensor]) -> ExportedProgram:
    """The exported program of a graph traced by `edge_dit_export.graph.trace`.

    Args:
        module: core ATen calls, one placeholder per input, a flat tuple of outputs, meta["val"] on
            every node. It is not changed; its buffers are shared.
        inputs: an example of each input.
    """
    graph = fx.Graph()
    results: Any = graph.graph_copy(module.graph, {})
    buffers = _lift_buffers(graph)
    given = [node for node in graph.nodes if node.op == "placeholder"][len(buffers) :]
    graph.output(tuple(results))
    signature = ExportGraphSignature(
        [
            *(_input(node, name) for name, node in buffers.items()),
            *(_input(node) for node in given),
        ],
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results],
    )
    arguments = (tuple(inputs), {})
    call = ModuleCallSignature([], [], tree_structure(arguments), tree_structure(tuple(results)))
    return _Flat(
        root={},
        graph=graph,
        graph_signature=signature,
        state_dict={name: getattr(module, name) for name in buffers},
        range_constraints={},
        module_call_graph=[ModuleCallEntry("", call)],
        example_inputs=arguments,
    )


def _lift_buffers(graph: fx.Graph) -> dict[str, fx.Node]:
    """Turn every buffer that is read into an input before the others; those inputs by name."""
    first = next(iter(graph.nodes))
    lifted: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        name = str(node.target)
        if name not in lifted:
            with graph.inserting_before(first):
                # Z-Image has modules that are called "2-1", which is no name of an argument.
                lifted[name] = graph.placeholder(re.sub(r"\W", "_", f"b_{name}"))
            lifted[name].meta = dict(node.meta)
        node.replace_all_uses_with(lifted[name])
        graph.erase_node(node)
    return lifted


def _input(node: fx.Node, buffer: str | None = None) -> InputSpec:
    argument = TensorArgument(node.name)
    if buffer is None:
        return InputSpec(InputKind.USER_INPUT, argument, None)
    return InputSpec(InputKind.BUFFER, argument, buffer, persistent=True)
