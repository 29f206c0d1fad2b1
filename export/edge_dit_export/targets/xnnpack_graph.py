"""Writes single calls of a graph as programs of ExecuTorch's XNNPACK delegate.

They are written directly in the delegate's own schema (executorch 1.5.1,
backends/xnnpack/serialization/schema.fbs). ExecuTorch's preprocess would lower and rewrite a whole
exported program for each call, which takes seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    serialize_xnnpack_binary,
)
from executorch.backends.xnnpack.utils.xnnpack_constants import (
    UINT64_MAX,
    XNN_FLAG_TRANSPOSE_WEIGHTS,
    XNN_INVALID_VALUE_ID,
    XNN_VALUE_FLAG_EXTERNAL_INPUT,
    XNN_VALUE_FLAG_EXTERNAL_OUTPUT,
)
from executorch.exir._serialize._named_data_store import NamedDataStore
from torch import Tensor, fx

from edge_dit.models.int8_products import frozen_product
from edge_dit.models.quantize import to_int8
from edge_dit_export.passes._graph import TO_IMAGE, TO_TOKENS, shape
from edge_dit_export.targets.convolution_of_tokens import CONVOLUTION_OF_TOKENS

aten: Any = torch.ops.aten
ALIGNMENT = 16
"""Alignment of constants in bytes: the delegate's CONSTANT_TENSOR_ALIGNMENT."""
BINARY = {
    aten.mul.Tensor: schema.XNNMultiply,
    aten.mul.Scalar: schema.XNNMultiply,
    aten.add.Tensor: schema.XNNAdd,
    aten.add.Scalar: schema.XNNAdd,
    aten.sub.Tensor: schema.XNNSubtract,
}
UNARY = {aten.sigmoid.default: schema.XNNSigmoid, aten._softmax.default: schema.XNNSoftmax}
OPERATIONS = (*BINARY, *UNARY, aten.permute.default, aten.mm.default, aten.bmm.default)
"""What XNNPACK computes with any float32 arguments."""
INT8_PRODUCT: Any = frozen_product._opoverload
LAYERS = (
    aten.linear.default,
    aten.convolution.default,
    CONVOLUTION_OF_TOKENS,
    INT8_PRODUCT,
)
"""What it computes only with constant weights."""


class Constants:
    """Frozen tensors by name, each held once.

    XNNPACK's cache of packed weights goes by name. So a name says all that the packing depends on:
    the tensor, its scales, its direction. Equal bytes lie in a program once, whatever their names.
    """

    def __init__(self) -> None:
        self._known: dict[str, bytes] = {}

    def key(self, tensor: Tensor, scale: Tensor | None = None, turned: bool = False) -> str:
        """Keep the bytes of a float32 or int8 tensor; their name in a program.

        Args:
            tensor: to be kept.
            scale: of its channels, if it is int8.
            turned: whether a layer takes it as it is, [K, N], not [N, K].
        """
        content = _bytes(tensor)
        key = hashlib.sha256(content).hexdigest()
        key += "" if scale is None else hashlib.sha256(_bytes(scale)).hexdigest()
        key += "T" if turned else ""
        self._known.setdefault(key, content)
        return key

    def __getitem__(self, key: str) -> bytes:
        return self._known[key]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


class DelegateProgram:
    """One call as a delegate's program.

    Args:
        call: of `OPERATIONS` or `LAYERS`.
        frozen: its frozen arguments, by position.
        constants: where their bytes are kept.
    """

    def __init__(self, call: fx.Node, frozen: dict[int, Tensor], constants: Constants) -> None:
        self._constants = constants
        self._values: list[schema.XValue] = []
        self._nodes: list[schema.XNode] = []
        self._data = [schema.ConstantDataOffset(0, 0)]
        self._inputs: list[int] = []
        self.inputs = [
            argument
            for position, argument in enumerate(call.args)
            if isinstance(argument, fx.Node) and position not in frozen
        ]
        given = iter([self._external(shape(node), len(self._inputs)) for node in self.inputs])
        result = self._external(shape(call), len(self.inputs), output=True)
        arguments: list[Any] = [
            (frozen[position] if position in frozen else next(given))
            if isinstance(argument, fx.Node)
            else argument
            for position, argument in enumerate(call.args)
        ]
        self._write(call, arguments, result)
        self._result = result

    def _write(self, call: fx.Node, arguments: list[Any], result: int) -> None:
        kind: Any = call.target
        if kind is aten.linear.default:
            x, weight, *bias = arguments
            self._fully_connected(x, weight, bias[0] if bias else None, result)
        elif kind is aten.mm.default:
            x, weight = arguments
            if isinstance(weight, Tensor):
                weight = self._constant(weight, turned=True)
            self._fully_connected(x, weight, None, result, XNN_FLAG_TRANSPOSE_WEIGHTS)
        elif kind is INT8_PRODUCT:
            self._int8_product(call, arguments, result)
        elif kind is CONVOLUTION_OF_TOKENS:
            self._convolution(arguments, result)
        elif kind is aten.convolution.default:
            self._convolution_of_images(call, arguments, result)
        elif kind is aten.permute.default:
            self._transpose(arguments[0], list(arguments[1]), result)
        elif kind is aten.bmm.default:
            self._binary(schema.XNNBatchMatrixMultiply, arguments, result)
        elif kind in BINARY:
            self._binary(BINARY[kind], arguments, result)
        else:
            self._node(UNARY[kind](input_id=arguments[0], output_id=result, flags=0))

    def _binary(self, kind: Any, arguments: Sequence[Any], result: int) -> None:
        one, other = map(self._operand, arguments)
        self._node(kind(input1_id=one, input2_id=other, output_id=result, flags=0))

    def _operand(self, argument: Any) -> int:
        """The number of the value for an argument: a tensor, or such a number already."""
        return self._constant(argument) if isinstance(argument, Tensor) else argument

    def _fully_connected(
        self, x: int, weight: Any, bias: Tensor | None, result: int, flags: int = 0
    ) -> None:
        self._node(
            schema.XNNFullyConnected(
                input1_id=x,
                filter_id=self._operand(weight),
                bias_id=XNN_INVALID_VALUE_ID if bias is None else self._constant(bias),
                output_id=result,
                flags=flags,
            )
        )

    def _int8_product(self, call: fx.Node, arguments: list[Any], result: int) -> None:
        """Quantise the rows of x, then multiply; both directions with the same int8 values.

        Where it goes back, the delegate's last input is the scales of the weight's channels.
        """
        x, weight, back, _, *before = arguments
        values, scale = to_int8(weight)
        source = shape(self.inputs[0])
        if back:
            scaled = self._inner(source)
            self._binary(schema.XNNMultiply, [x, *before], scaled)
            x, scale = scaled, torch.ones(shape(call)[1])
        levels = self._quantized_rows(source)
        self._node(schema.XNNConvert(input_id=x, output_id=levels, flags=0))
        flags = XNN_FLAG_TRANSPOSE_WEIGHTS if back else 0
        self._fully_connected(levels, self._int8_constant(values, scale, back), None, result, flags)

    def _transpose(self, x: int, order: list[int], result: int) -> None:
        order = [dim % len(order) for dim in order]
        self._node(
            schema.XNNStaticTranspose(
                input_id=x, num_dims=len(order), perm=order, output_id=result, flags=0
            )
        )

    def _convolution_of_images(self, call: fx.Node, arguments: list[Any], result: int) -> None:
        """Transpose before and after: XNNPACK convolves [N, H, W, C]."""
        x, *settings, _transposed, _adjustment, groups = arguments
        n, c, h, w = shape(self.inputs[0])
        source = self._inner((n, h, w, c))
        n, c, h, w = shape(call)
        convolved = self._inner((n, h, w, c))
        self._transpose(x, TO_TOKENS, source)
        self._convolution([source, *settings, groups], convolved)
        self._transpose(convolved, TO_IMAGE, result)

    def _convolution(self, arguments: list[Any], result: int) -> None:
        x, weight, bias, stride, padding, dilation, groups = arguments
        outputs, inputs, *kernel = weight.shape
        depthwise = inputs == 1
        filter_ = weight.permute(1, 2, 3, 0) if depthwise else weight.permute(0, 2, 3, 1)
        kind = schema.XNNDepthwiseConv2d if depthwise else schema.XNNConv2d
        self._node(
            kind(
                padding_top=padding[0],
                padding_right=padding[1],
                padding_bottom=padding[0],
                padding_left=padding[1],
                kernel_height=kernel[0],
                kernel_width=kernel[1],
                subsampling_height=stride[0],
                subsampling_width=stride[1],
                dilation_height=dilation[0],
                dilation_width=dilation[1],
                group_input_channels=inputs,
                group_output_channels=outputs // groups,
                groups=groups,
                adjustment_height=0,
                adjustment_width=0,
                input1_id=x,
                filter_id=self._constant(filter_),
                bias_id=XNN_INVALID_VALUE_ID if bias is None else self._constant(bias),
                output_id=result,
                flags=0,
            )
        )

    def _node(self, node: Any) -> None:
        self._nodes.append(schema.XNode(xnode_union=node, debug_handle=len(self._nodes)))

    def _value(
        self,
        dims: Sequence[int],
        external: int = XNN_INVALID_VALUE_ID,
        buffer: int = 0,
        flags: int = 0,
        quantized: tuple[schema.XNNDatatype, Any] | None = None,
    ) -> int:
        """A value's number; ``quantized``: its datatype and parameters, where it is not float32."""
        number = len(self._values)
        value: Any = schema.XNNTensorValue(
            datatype=quantized[0] if quantized else schema.XNNDatatype.xnn_datatype_fp32,
            num_dims=len(dims),
            dims=list(dims),
            constant_buffer_idx=buffer,
            external_id=external,
            flags=flags,
            id_out=number,
        )
        if quantized:
            value = schema.XNNQuantizedTensorValue(value, quantized[1])
        self._values.append(schema.XValue(xvalue_union=value))
        return number

    def _external(self, dims: Sequence[int], number: int, output: bool = False) -> int:
        flag = XNN_VALUE_FLAG_EXTERNAL_OUTPUT if output else XNN_VALUE_FLAG_EXTERNAL_INPUT
        value = self._value(dims, number, 0, flag)
        if not output:
            self._inputs.append(value)
        return value

    def _inner(self, dims: Sequence[int]) -> int:
        return self._value(dims)

    def _quantized_rows(self, dims: Sequence[int]) -> int:
        kind = schema.XNNDatatype.xnn_datatype_qdint8
        return self._value(dims, quantized=(kind, schema.PerTokenDynamicQuant(1)))

    def _constant(self, tensor: Tensor, turned: bool = False) -> int:
        buffer = self._buffer(tensor, self._constants.key(tensor, turned=turned))
        return self._value(tuple(tensor.shape), buffer=buffer)

    def _int8_constant(self, values: Tensor, scale: Tensor, back: bool) -> int:
        """int8 [N, K], with a scale for each of the N rows, or of the K columns if ``back``."""
        scales = self._buffer(scale, self._constants.key(scale))
        parameters = schema.PerChannelQuant([], int(back), scales, scale.numel())
        kind = schema.XNNDatatype.xnn_datatype_qcint8
        buffer = self._buffer(values, self._constants.key(values, scale, back))
        return self._value(tuple(values.shape), buffer=buffer, quantized=(kind, parameters))

    def _buffer(self, tensor: Tensor, key: str) -> int:
        """The number of a constant's bytes in the program."""
        self._data.append(
            schema.ConstantDataOffset(UINT64_MAX, tensor.numel() * tensor.element_size(), key)
        )
        return len(self._data) - 1

    def serialize(self) -> bytes:
        """The bytes that the delegate loads."""
        graph = schema.XNNGraph(
            version="0",
            xnodes=self._nodes,
            xvalues=self._values,
            num_externs=len(self._inputs) + 1,
            input_ids=self._inputs,
            output_ids=[self._result],
            constant_data=self._data,
        )
        return serialize_xnnpack_binary(graph, bytearray())

    def named_data(self) -> Any:
        """The constants that the program refers to by name."""
        store = NamedDataStore()
        for entry in self._data[1:]:
            store.add_named_data(entry.named_key, self._constants[entry.named_key], ALIGNMENT)
        return store.get_named_data_store_output()
