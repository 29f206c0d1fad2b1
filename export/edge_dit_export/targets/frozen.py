"""Writes the frozen weights of a bundle to safetensors files, each weight once.

Any reader can memory-map the files. The graphs of the onnx target refer to their bytes, and the
runtimes hand out views of them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from edge_dit.contract.targets import FILE_BYTES, INT4, INT8, ROTATED, WIDE, frozen_file
from edge_dit.models.quantize import group_of, to_int4, to_int8
from edge_dit.models.rotation import rotated_matrix

DTYPES = {
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    INT8: ("I8", 1),
    ROTATED: ("I8", 1),
    INT4: ("U8", 1),
}
"""Name in safetensors and bytes of an element; of int4 two make one."""
SCALED = (INT8, ROTATED, INT4)
"""Kinds that have scales."""
ALIGNMENT = 64
HEADER_BYTES = 192
"""Most bytes that a header takes for itself, and for each tensor besides its name."""


@dataclass(frozen=True)
class Later:
    """A float32 tensor that is in memory only while it is written."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Place:
    """Where a stored tensor's bytes lie: in which file, from where on, how many."""

    file: str
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

    @property
    def length(self) -> int:
        return math.prod(self.shape) * self.width


@dataclass(frozen=True)
class _File:
    name: str
    header: bytes
    entries: list[_Entry]


class FrozenStore:
    """Frozen tensors to be written.

    Args:
        tensors: float32 by name; a memory-mapped one is read only when it is written.
        kinds: name -> how it is stored, where that is not as float32: one of `DTYPES`. int8 and
            int4 add the tensor "<name>.scale".
        limit: most bytes of a file that has more than one tensor.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor | Later],
        kinds: Mapping[str, str],
        limit: int = FILE_BYTES,
    ) -> None:
        self.tensors, self.limit = dict(tensors), limit
        self._dtypes = dict(kinds)

    def add(self, name: str, tensor: Tensor | Later, dtype: str = "float32") -> None:
        """Add a tensor that is stored as ``dtype``, unless there is one of that name. Only before
        `place` or `write` is called.
        """
        if name not in self.tensors:
            self.tensors[name], self._dtypes[name] = tensor, dtype

    @cached_property
    def _files(self) -> list[_File]:
        return [
            _File(frozen_file(number), _header(entries), entries)
            for number, entries in enumerate(_split(self._entries(), self.limit))
        ]

    @cached_property
    def _places(self) -> dict[str, Place]:
        return dict(place for file in self._files for place in _places(file))

    def stored_as(self, name: str) -> str:
        """The dtype ``name`` is stored as."""
        return self._dtypes.get(name, "float32")

    def read_as(self, name: str) -> str:
        """What graphs read ``name`` as: "float32", "float16", "int8" or "int4"."""
        kind = self.stored_as(name)
        return INT8 if kind == ROTATED else kind

    @property
    def rounds(self) -> bool:
        """Whether anything is stored in fewer bytes than float32."""
        return any(kind != WIDE for kind in self._dtypes.values())

    def keys(self, name: str) -> list[str]:
        """Keys in the files that make up ``name``: itself, and its scales if it has them."""
        return [name, f"{name}.scale"] if self.stored_as(name) in SCALED else [name]

    def inputs(self, names: Mapping[str, str]) -> dict[str, str]:
        """Inputs of a graph that takes stored tensors -> keys in the files.

        Args:
            names: input -> name of the tensor.
        """
        return {
            local + key.removeprefix(name): key
            for local, name in names.items()
            for key in self.keys(name)
        }

    def place(self, key: str) -> Place:
        """Where a key's bytes lie."""
        return self._places[key]

    def write(self, directory: Path) -> list[str]:
        """Write the files; their names. One tensor at a time is in memory."""
        for file in self._files:
            with (directory / file.name).open("wb") as stream:
                stream.write(file.header)
                for entry in file.entries:
                    self._value(entry).contiguous().numpy().tofile(stream)
                stream.flush()
                os.fsync(stream.fileno())
        return [file.name for file in self._files]

    def _value(self, entry: _Entry) -> Tensor:
        stored = self.tensors[entry.name]
        tensor = stored.read() if isinstance(stored, Later) else stored.detach()
        kind = self.stored_as(entry.name)
        if kind in SCALED:
            split = to_int4 if kind == INT4 else to_int8
            values, scale = split(rotated_matrix(tensor) if kind == ROTATED else tensor)
            return scale if entry.is_scale else values
        return tensor.half() if kind == "float16" else tensor

    def _entries(self) -> list[_Entry]:
        """Everything in the files, widest elements first, so that all are aligned."""
        entries = []
        for name, tensor in self.tensors.items():
            kind = self.stored_as(name)
            shape, scales = list(tensor.shape), [tensor.shape[0]]
            if kind == INT4:
                inputs = math.prod(shape[1:])
                shape, scales = [shape[0], inputs // 2], [shape[0], inputs // group_of(inputs)]
            entries.append(_Entry(name, False, *DTYPES[kind], shape))
            if kind in SCALED:
                entries.append(_Entry(name, True, *DTYPES["float32"], scales))
        return sorted(entries, key=lambda entry: -entry.width)


def _split(entries: list[_Entry], limit: int) -> list[list[_Entry]]:
    """Entries of each file, in order; a file is at least one entry long."""
    files: list[list[_Entry]] = [[]]
    room = limit - HEADER_BYTES
    for entry in entries:
        needed = entry.length + len(entry.key) + HEADER_BYTES
        if files[-1] and needed > room:
            files.append([])
            room = limit - HEADER_BYTES
        files[-1].append(entry)
        room -= needed
    return files


def _header(entries: list[_Entry]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        header[entry.key] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [end, end + entry.length],
        }
        end += entry.length
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw


def _places(file: _File) -> list[tuple[str, Place]]:
    places, begin = [], len(file.header)
    for entry in file.entries:
        places.append((entry.key, Place(file.name, begin, entry.length)))
        begin += entry.length
    return places
