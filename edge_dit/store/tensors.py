"""Safetensors files with digests: read without trust, one tensor at a time.

The format is that of huggingface/safetensors: a length, a JSON header, the tensors' bytes without
gaps. Files written here have digests in their metadata: "sha256.<tensor>" of each tensor's bytes,
and "sha256" of the header. Other readers ignore them. Files written by others, such as a model's
shards or a user's LoRA, have no digests, and their content is not checked.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edge_dit.store.documents import digest, parse_json
from edge_dit.store.files import open_regular, write_atomic

HEADER_LIMIT = 2 * 2**20
"""Largest header read, in bytes: some 10,000 tensors."""
MAX_DIMENSIONS = 8
DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}
"""Dtype in safetensors -> in numpy, of what is read and written."""
NAMES = {kind: name for name, kind in DTYPES.items()}
ALIGNMENT = 8
DIGEST = "sha256"


@dataclass(frozen=True)
class Place:
    """A tensor in a file: dtype, shape, and its bytes [begin, end)."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header: every place lies in the file, and together they fill it."""

    metadata: dict[str, str]
    tensors: dict[str, Place]

    @property
    def hashed(self) -> bool:
        """Whether the file carries digests."""
        return DIGEST in self.metadata


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with digests, atomically. The same tensors give the same bytes;
    huggingface/safetensors 0.8 writes metadata in random order.
    """
    plain = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    order = sorted(plain, key=lambda name: (-plain[name].itemsize, name))  # so that all are aligned
    sealed, entries, end = dict(metadata or {}), {}, 0
    for name in order:
        value, begin = plain[name], end
        end += value.nbytes
        entries[name] = {
            "dtype": NAMES[value.dtype.str],
            "shape": value.shape,
            "data_offsets": [begin, end],
        }
        sealed[f"{DIGEST}.{name}"] = hashlib.sha256(value.data).hexdigest()
    kinds = {name: (value.dtype.str, value.shape) for name, value in plain.items()}
    sealed[DIGEST] = _seal(sealed, kinds)
    header = json.dumps({"__metadata__": sealed, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    length = len(header).to_bytes(8, "little")
    write_atomic(path, length, header, *(plain[name].data for name in order))


def _seal(metadata: Mapping[str, str], kinds: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """Digest of a header without this digest itself."""
    return digest([{k: v for k, v in metadata.items() if k != DIGEST}, kinds])


def read_header(file: BinaryIO) -> Header:
    """The checked header of an open file; never allocates more than the file's size.

    Raises:
        ValueError: not a whole safetensors file of our dtypes, or a header that was changed.
    """
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(HEADER_LIMIT, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    raw = parse_json(file.read(length))
    if not isinstance(raw, dict):
        raise ValueError("the header is not an object")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
        raise ValueError("metadata that is not text")
    tensors = {name: _place(name, entry, 8 + length) for name, entry in raw.items()}
    end = 8 + length
    for name, place in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin != end:
            raise ValueError(f"{name!r:.80} does not begin where the one before it ends")
        end = place.end
    if end != size:
        raise ValueError(f"{size} bytes, of which its header accounts for {end}")
    if DIGEST in metadata:
        kinds = {name: (place.dtype.str, place.shape) for name, place in tensors.items()}
        if metadata[DIGEST] != _seal(metadata, kinds):
            raise ValueError("the header is not the one that was written")
        if any(f"{DIGEST}.{name}" not in metadata for name in tensors):
            raise ValueError("a tensor without digest")
    elif any(key.startswith(f"{DIGEST}.") for key in metadata):
        raise ValueError("digests of tensors, but none of the header")
    return Header(metadata, tensors)


def _place(name: str, entry: Any, start: int) -> Place:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r:.80} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name!r:.80} of dtype {dtype!r:.20}, not one of {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name!r:.80} of shape {shape!r:.80}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r:.80} at {offsets!r:.80}")
    kind, (begin, end) = np.dtype(DTYPES[dtype]), offsets
    if end - begin != math.prod(shape) * kind.itemsize:
        raise ValueError(f"{name!r:.80} of shape {shape!r:.80} in {end - begin!r:.20} bytes")
    return Place(kind, tuple(shape), start + begin, start + end)


def _naturals(value: Any) -> bool:
    """Whether ``value`` is a list of sizes; none is larger than any file."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**48 for v in value)


class TensorFile:
    """A safetensors file whose header was checked. Each `read` opens it again.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be opened.
        ValueError: not a whole safetensors file of our dtypes, or a header that was changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            self.header = read_header(file)

    def read(self, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Read tensors by name, by default all; only their own bytes are read.

        Raises:
            OSError: the file is gone.
            ValueError: it ends too early, or a tensor is not what was written.
        """
        tensors = {}
        with open_regular(self.path) as file:
            for name in self.header.tensors if names is None else names:
                place = self.header.tensors[name]
                file.seek(place.begin)
                data = bytearray(place.end - place.begin)
                if file.readinto(data) < len(data):  # it shrank since its header was read
                    raise ValueError(f"it ends within {name!r:.80}")
                written = self.header.metadata.get(f"{DIGEST}.{name}")
                if self.header.hashed and hashlib.sha256(data).hexdigest() != written:
                    raise ValueError(f"{name!r:.80} is not what was written")
                tensors[name] = np.frombuffer(data, place.dtype).reshape(place.shape)
        return tensors
