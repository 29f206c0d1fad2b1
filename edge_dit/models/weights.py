"""The safetensors weights of a model: are they what its configuration says, and all finite?

Headers are read by huggingface/safetensors, which checks them. Content is read once, in chunks, for
the hash and for values that are not finite.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import safe_open

from edge_dit.errors import BadInput
from edge_dit.models.components import REMEDY, UNQUANTISED, Weights, file_fault, refusing
from edge_dit.store.files import open_regular, sha256
from edge_dit.store.remembered import Remembered

NOT_FINITE = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
"""Dtype of weights -> unsigned integers of its width, and its exponent's bits; a value whose
exponent is all ones is infinite or not a number (IEEE 754)."""
BITS = {"BOOL": 8, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BF16": 16}
"""Dtypes whose width their name does not say."""
CHUNK = 2**20
"""Bytes read at a time; hashing larger pieces is slower (they leave the cache)."""
QUANTISED = (
    (
        "bitsandbytes",
        (".absmax", ".quant_map", "quant_state.bitsandbytes", ".SCB", ".weight_format"),
    ),
    ("Nunchaku (SVDQuant)", (".wscales", ".wtscale", ".wcscales", ".smooth_factor", ".proj_down")),
    ("GPTQ or AWQ", (".qweight", ".qzeros", ".g_idx")),
    ("quanto", ("._data", "._scale", "._shift", ".weight._data", ".output_scale")),
    ("MLX", (".scales", ".biases")),
    ("compressed-tensors", (".weight_packed", ".weight_shape", ".weight_zero_point")),
    ("torchao", (":qdata", "_qdata", ":scale", ".int_data", ".tensor_impl", ":_data")),
    (
        "float8 with scales",
        (
            ".scale_weight",
            ".scale_input",
            ".weight_scale",
            ".weight_scale_inv",
            ".weight_scale_2",
            ".input_scale",
            "scaled_fp8",
            ".comfy_quant",
        ),
    ),
)
"""Quantised format -> how names of the tensors that it adds end."""


class Stored(NamedTuple):
    """File that stores a tensor, its shape, and its dtype by safetensors' name."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Measured(NamedTuple):
    """SHA-256 of a file's bytes, hexadecimal, and its first tensor that is not finite or ""."""

    sha256: str
    not_finite: str


# ---------------------------------------------------------------- headers


def stored_in(weights: Weights) -> dict[str, Stored]:
    """Every tensor in the files of a model by name.

    Raises:
        BadInput: a missing or damaged file, an index that names absent tensors, one tensor in two
            files, or a quantised checkpoint.
    """
    tensors: dict[str, Stored] = {}
    for path in weights.files:
        held = _header(path)
        if twice := held.keys() & tensors.keys():
            raise BadInput(
                path,
                found=f"{min(twice)}, which {tensors[min(twice)].file.name} holds too",
                expected="every tensor once",
                remedy=REMEDY,
            )
        wanted = [name for name, file in weights.shard_of.items() if file == path]
        if missing := sorted(set(wanted) - held.keys()):
            raise BadInput(
                weights.index,
                found=f"{len(missing)} tensors that {path.name} does not hold, first {missing[0]}",
                expected="the index of these shards",
                remedy=REMEDY,
            )
        if weights.index is not None and (unnamed := sorted(held.keys() - set(wanted))):
            if (fault := quantised(held)) is not None:
                raise fault
            raise BadInput(
                weights.index,
                found=f"{len(unnamed)} tensors of {path.name} are in no file by this index, first "
                f"{unnamed[0]}",
                expected="every tensor of its shards",
                remedy=REMEDY,
            )
        tensors |= held
    if (fault := quantised(tensors)) is not None:
        raise fault
    return tensors


def _header(path: Path) -> dict[str, Stored]:
    """The tensors of one file."""
    if (fault := file_fault(path)) is not None:
        raise fault
    with refusing(path, "damaged", "a whole safetensors file"), safe_open(path, "np") as file:
        written_by = (file.metadata() or {}).get("format", "pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        held = {n: Stored(path, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    if written_by in ("mlx", "tf", "flax"):  # they order some axes otherwise
        raise BadInput(
            path,
            found=f"weights written for {written_by!r:.40}, by the file's metadata",
            expected='weights for torch ("format": "pt")',
            remedy="get the weights for torch from the model's own repository",
        )
    return held


def quantised(tensors: Mapping[str, Stored]) -> BadInput | None:
    """The fault of a quantised checkpoint, or None.

    Its integers or 8-bit floats are weights only together with scales that no class of diffusers
    or transformers has, so that a reader which ignores them computes with garbage.
    """
    for label, ends in QUANTISED:
        marks = sorted(name for name in tensors if name.endswith(ends) or _packed(name, ends))
        if marks:
            return _is_quantised(
                f"{label}: {len(marks)} tensors like {marks[0]}", tensors[marks[0]]
            )
    small = sorted(n for n, t in tensors.items() if t.dtype not in NOT_FINITE and not _counts(n, t))
    if not small:
        return None
    dtypes = ", ".join(sorted({tensors[name].dtype for name in small}))
    return _is_quantised(f"{len(small)} tensors of {dtypes} like {small[0]}", tensors[small[0]])


def _packed(name: str, ends: tuple[str, ...]) -> bool:
    """Whether a mark stands within the name: "q.weight.quant_state.bitsandbytes__nf4"."""
    return any(f"{end}__" in name for end in ends)


def _counts(name: str, tensor: Stored) -> bool:
    """Whether a tensor counts positions or steps, and so is no weight."""
    return tensor.dtype in ("I64", "I32", "BOOL") and not name.endswith(("weight", "bias"))


def _is_quantised(what: str, tensor: Stored) -> BadInput:
    return BadInput(
        tensor.file,
        found=f"a quantised checkpoint ({what})",
        expected=f"weights in {', '.join(sorted(NOT_FINITE))} and nothing beside them",
        remedy=UNQUANTISED,
    )


def misfits(
    tensors: Mapping[str, Stored],
    expected: Mapping[str, Any],
    where: Path,
    ignored: Iterable[str] = (),
) -> list[BadInput]:
    """What does not fit between stored tensors and those of a configuration.

    Args:
        tensors: of the files.
        expected: tensors of the configuration by name; their shapes are read.
        where: folder of the model.
        ignored: stored tensors that may be there.
    """
    faults = []
    if missing := sorted(expected.keys() - tensors.keys()):
        faults.append(missing_fault(missing, len(expected), where))
    if extra := sorted(tensors.keys() - expected.keys() - set(ignored)):
        faults.append(extra_fault(extra, tensors[extra[0]].file))
    for name in sorted(expected.keys() & tensors.keys()):
        if tensors[name].shape != tuple(expected[name].shape):
            faults.append(shape_fault(name, tensors[name], tuple(expected[name].shape)))
            break
    return faults


def missing_fault(names: list[str], total: int, where: Path) -> BadInput:
    """The fault of tensors that the configuration has and no file: they would be random."""
    return BadInput(
        where,
        found=f"{len(names)} tensors of the model are in no file, first {names[0]}",
        expected=f"all {total} of its configuration" if total else "all of its configuration",
        remedy=REMEDY,
    )


def extra_fault(names: list[str], where: Path) -> BadInput:
    """The fault of tensors that are stored and that the configuration does not have."""
    return BadInput(
        where,
        found=f"{len(names)} tensors that its config.json does not explain, first {names[0]}",
        expected="the tensors of the configuration and no others",
        remedy="get weights and config.json of one and the same model, as its authors publish it",
    )


def shape_fault(name: str, tensor: Stored, expected: tuple[int, ...]) -> BadInput:
    """The fault of a tensor that is stored in another shape than the configuration's."""
    return BadInput(
        tensor.file,
        found=f"{name} of shape {list(tensor.shape)}",
        expected=f"{list(expected)}, by config.json",
        remedy=REMEDY,
    )


# ---------------------------------------------------------------- content


@cache
def _remembered() -> Remembered:
    return Remembered("weights.json")


def measure(path: Path) -> Measured:
    """Hash of a safetensors file, and whether its weights are finite; read at most once while the
    file stays the same.

    Raises:
        BadInput: damaged, or it cannot be read.
    """
    found = _remembered().of(path, lambda: list(_measure(path)))
    return Measured(*found)


def hash_of(path: Path) -> str:
    """SHA-256 of a file that is loaded, hexadecimal.

    Raises:
        BadInput: it cannot be read.
    """
    if (fault := file_fault(path)) is not None and not path.is_file():
        raise fault
    with refusing(path, "cannot be read", "a file that you may read"):
        if path.suffix == ".safetensors":
            with suppress(BadInput):  # damaged: its bytes have a hash all the same
                return measure(path).sha256
        return sha256(path)


def keep_measured() -> None:
    """Remember what `measure` found for the next process."""
    _remembered().save()


def _measure(path: Path) -> Measured:
    with refusing(path, "damaged", "a whole safetensors file"):
        with safe_open(path, "np") as tensors:
            slices = [(name, tensors.get_slice(name)) for name in tensors.offset_keys()]
            order = [(name, s.get_dtype(), int(np.prod(s.get_shape()))) for name, s in slices]
        digest, first = hashlib.sha256(), ""
        with open_regular(path) as file:
            length = file.read(8)
            digest.update(length)
            digest.update(file.read(int.from_bytes(length, "little")))
            for name, dtype, count in order:
                finite = _read(file, digest, dtype, count)
                first = first or ("" if finite else name)
            while rest := file.read(CHUNK):
                digest.update(rest)
    return Measured(digest.hexdigest(), first)


def _read(file: BinaryIO, digest: Any, dtype: str, count: int) -> bool:
    """Read a tensor of ``count`` values in chunks; whether all are finite."""
    left = -(-count * _bits(dtype) // 8)
    finite = True
    while left:
        data = file.read(min(CHUNK, left))
        if not data:
            raise ValueError("it ends within a tensor")
        digest.update(data)
        left -= len(data)
        if dtype in NOT_FINITE:
            kind, exponent = NOT_FINITE[dtype]
            values = np.frombuffer(data, kind)
            finite = finite and not bool((values & values.dtype.type(exponent) == exponent).any())
    return finite


def _bits(dtype: str) -> int:
    if dtype in BITS:
        return BITS[dtype]
    return int("".join(c for c in dtype.split("_")[0] if c.isdigit()))
