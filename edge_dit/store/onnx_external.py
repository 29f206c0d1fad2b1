"""Which other files an ONNX file refers to, read from its bytes.

onnxruntime 1.19 follows a tensor's external location out of the model's folder, absolute or through
"..". A forged graph could make it map any file of the user. Only the fields that lead to a location
are decoded (onnx.proto3 and the protobuf wire format), so no package is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

CHILDREN = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""Message -> number of a field -> message in that field, down to a TensorProto's external_data."""
KEY, VALUE = 1, 2
"""Fields of an entry of external_data, a StringStringEntryProto."""
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_DEPTH = 100
"""protobuf's own limit."""
MAX_FIELDS = 2_000_000
"""Several times what the largest model's graph has; decoding so many takes seconds."""


def external_locations(data: bytes) -> set[str]:
    """Locations of all external tensors of a serialised ModelProto, in graphs and functions.

    Raises:
        ValueError: not protobuf of the kind exporters write.
    """
    locations: set[str] = set()
    open_messages = [("model", _fields(memoryview(data)))]
    for _ in range(MAX_FIELDS):
        if not open_messages:
            return locations
        kind, fields = open_messages[-1]
        number, part = next(fields, (0, None))
        if part is None:
            open_messages.pop()
        elif child := CHILDREN[kind].get(number):
            if child == "entry":
                locations |= _location(part)
            else:
                open_messages.append((child, _fields(part)))
        if len(open_messages) > MAX_DEPTH:
            raise ValueError("nested too deep")
    raise ValueError(f"more than {MAX_FIELDS} fields")


def _location(entry: memoryview) -> set[str]:
    """The value of an entry of external_data whose key is "location"."""
    fields = list(islice(_fields(entry), 3))
    if [number for number, _ in fields] not in ([KEY, VALUE], [KEY]):
        raise ValueError("external data that is not a key and a value")
    key, *value = (bytes(part) for _, part in fields)
    return {text.decode("utf-8") for text in value} if key == b"location" else set()


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of each field that holds bytes; (0, no bytes) for any other."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire, begin = tag & 7, at
        if wire == VARINT:
            _, at = _varint(message, at)
            begin = at
        elif wire in (FIXED64, FIXED32):
            at = begin = at + (8 if wire == FIXED64 else 4)
        elif wire == BYTES:
            length, begin = _varint(message, at)
            at = begin + length
        else:
            raise ValueError(f"a field of wire type {wire}")
        if at > len(message):
            raise ValueError("it ends within a field")
        yield (tag >> 3 if wire == BYTES else 0), message[begin:at]


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number at ``at``, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it ends within a number")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than 64 bits")
