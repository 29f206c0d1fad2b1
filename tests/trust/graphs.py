"""An ONNX graph, and the few operations that planted mistakes are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, helper, numpy_helper


class Graph:
    """An ONNX graph, with the few operations that mistakes are made of."""

    def __init__(self, graph: GraphProto) -> None:
        self.proto = graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}

    def node(self, kind: str, *inputs: str, at: int = 0) -> NodeProto:
        """Of the nodes of a kind that read all ``inputs``, number ``at``."""
        wanted = set(inputs)
        found = [n for n in self.proto.node if n.op_type == kind and wanted <= set(n.input)]
        return found[at]

    def after(self, node: NodeProto, kind: str, output: int = 0) -> NodeProto:
        """The first node of a kind that reads what ``node`` makes."""
        return self.node(kind, node.output[output])

    def before(self, name: str) -> NodeProto:
        """The node that makes a tensor."""
        return next(node for node in self.proto.node if name in node.output)

    def replace(self, old: str, new: str) -> None:
        """Let all that reads one tensor read another."""
        for node in self.proto.node:
            for place, name in enumerate(node.input):
                if name == old:
                    node.input[place] = new

    def bypass(self, node: NodeProto, kept: str) -> None:
        """Leave a node out: what read its result reads one of its arguments."""
        assert kept in node.input
        self.replace(node.output[0], kept)

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """A new constant."""
        name = f"wrong_{len(self.proto.initializer)}"
        self.proto.initializer.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def change(self, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Change a weight."""
        tensor = self.constants[name]
        value = numpy_helper.to_array(tensor).copy()
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(value)), name))

    def scalar(self, value: float) -> str:
        """The name of the one scalar constant of a value."""
        is_it = [
            tensor.name
            for tensor in self.proto.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT
            and not tensor.dims
            and np.isclose(numpy_helper.to_array(tensor), value, rtol=1e-5, atol=0)
        ]
        (name,) = is_it
        return name

    def insert(self, kind: str, inputs: list[str], before: NodeProto, **attributes: Any) -> str:
        """Compute something new ahead of a node; the name of the result."""
        name = f"wrong_{len(self.proto.node)}"
        place = list(self.proto.node).index(before)
        self.proto.node.insert(place, helper.make_node(kind, inputs, [name], **attributes))
        return name

    def output(self, name: str, kind: str, *more: str) -> None:
        """Compute something else from a result of the graph, under its name."""
        node = self.before(name)
        node.output[list(node.output).index(name)] = "right"
        self.replace(name, "right")
        self.proto.node.append(helper.make_node(kind, ["right", *more], [name]))

    def swap(self, one: str, other: str) -> None:
        """Exchange the names of two results."""
        first, second = self.before(one), self.before(other)
        places = list(first.output).index(one), list(second.output).index(other)
        first.output[places[0]], second.output[places[1]] = other, one


def set_attribute(node: NodeProto, name: str, value: Any) -> None:
    (found,) = [attribute for attribute in node.attribute if attribute.name == name]
    found.CopyFrom(helper.make_attribute(name, value))
