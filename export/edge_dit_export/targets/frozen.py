"""Writes the frozen weights of a bundle to one safetensors file, each weight once.

Any reader can memory-map the file. The graphs of the onnx target refer to its bytes, and the
runtimes hand out views of it.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from edge_dit.models.quantize import to_int8

DTYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "int8": ("I8", 1)}
"""Name in safetensors and bytes of an element."""
ALIGNMENT = 64


@dataclass(frozen=True)
class Place:
    """Where a stored tensor's bytes lie in the file."""

    offset: int
    length: int


@dataclass(frozen=True)
class _Entry:
    name: str
    is_scale: bool
    dtype: str
    width: int
    shape: list[int]

    @property
    def key(self) -> str:
        return f"{self.name}.scale" if self.is_scale else self.name


class FrozenStore:
    """Frozen tensors to be written.

    Args:
        tensors: float32 by name; a memory-mapped one is read only when it is written.
        small: names of those stored as ``dtype``.
        dtype: "float32", "float16" or "int8"; int8 adds the tensor "<name>.scale".
    """

    def __init__(self, tensors: dict[str, Tensor], small: set[str], dtype: str) -> None:
        self.tensors, self.small, self.dtype = tensors, small, dtype
        self._plan()

    def stored_as(self, name: str) -> str:
        """The dtype ``name`` is stored as."""
        return self.dtype if name in self.small else "float32"

    def keys(self, name: str) -> list[str]:
        """Keys in the file that make up ``name``: itself, and its scales in int8."""
        return [name, f"{name}.scale"] if self.stored_as(name) == "int8" else [name]

    def place(self, key: str) -> Place:
        """Where a key's bytes lie."""
        return self._places[key]

    def write(self, path: Path) -> None:
        """Write the file; one tensor at a time is in memory."""
        with path.open("wb") as file:
            file.write(self._header)
            for entry in self._entries():
                self._value(entry).contiguous().numpy().tofile(file)
            file.flush()
            os.fsync(file.fileno())

    def _value(self, entry: _Entry) -> Tensor:
        tensor = self.tensors[entry.name].detach()
        kind = self.stored_as(entry.name)
        if kind == "int8":
            values, scale = to_int8(tensor)
            return scale if entry.is_scale else values
        return tensor.half() if kind == "float16" else tensor

    def _entries(self) -> list[_Entry]:
        """Everything in the file, widest elements first, so that all are aligned."""
        entries = []
        for name, tensor in self.tensors.items():
            kind = self.stored_as(name)
            entries.append(_Entry(name, False, *DTYPES[kind], list(tensor.shape)))
            if kind == "int8":
                entries.append(_Entry(name, True, *DTYPES["float32"], [tensor.shape[0]]))
        return sorted(entries, key=lambda entry: -entry.width)

    def _plan(self) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        ends: dict[str, tuple[int, int]] = {}
        end = 0
        for entry in self._entries():
            length = math.prod(entry.shape) * entry.width
            header[entry.key] = {
                "dtype": entry.dtype,
                "shape": entry.shape,
                "data_offsets": [end, end + length],
            }
            ends[entry.key] = (end, length)
            end += length
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
        self._header = len(raw).to_bytes(8, "little") + raw
        start = len(self._header)
        self._places = {key: Place(start + begin, length) for key, (begin, length) in ends.items()}
