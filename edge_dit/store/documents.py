"""JSON files with a digest of their content, read without trust."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from edge_dit.errors import BadInput
from edge_dit.store.files import open_regular, write_json

LIMIT = 64 * 2**20
"""Largest document read, in bytes: an index of 200,000 draws. Parsed, it takes far more memory."""
DIGEST = "sha256"
"""Key of the digest of all other keys."""
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""``__pydantic_config__`` of the dataclasses that documents are read into."""
T = TypeVar("T")


def write_document(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` with its digest, by which a reader notices any change."""
    plain = json.loads(json.dumps(value))
    write_json(path, {**plain, DIGEST: digest(plain)})


def digest(value: Any) -> str:
    """SHA-256 of a JSON value; layout and order of keys make no difference."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_document(
    path: Path, what: str, remedy: str, schema: int | None = None, sealed: bool = True
) -> dict[str, Any]:
    """The object in a JSON file, without its digest.

    Args:
        path: of the file.
        what: what a folder with it is, for the message ("a bundle folder").
        remedy: how to make one.
        schema: the newest ``schema_version`` known, for files that carry one.
        sealed: whether the file must have a digest; False for files that people may write by hand.
            A digest that is there must be right.

    Raises:
        BadInput: missing, not JSON, too large, without its digest, changed since it was written, or
            of another schema.
    """
    try:
        raw = parse_json(read_whole(path))
    except FileNotFoundError:
        raise BadInput(
            path.parent, found=f"no {path.name} in it", expected=what, remedy=remedy
        ) from None
    except (OSError, ValueError) as error:
        raise BadInput(path, found=f"unreadable ({error})", remedy=remedy) from None
    if not isinstance(raw, dict):
        raise BadInput(path, found="not a JSON object", remedy=remedy)
    version = raw.get("schema_version")
    if schema is not None and (type(version) is not int or not 1 <= version <= schema):
        newer = type(version) is int and version > schema
        raise BadInput(
            path,
            found=f"schema version {version!r:.40}",
            expected=f"at most {schema}",
            remedy="upgrade edge-dit" if newer else remedy,
        )
    if DIGEST not in raw:
        if sealed:
            raise BadInput(
                path,
                found=f"no digest of its content ({DIGEST!r})",
                expected="a file that edge-dit wrote",
                remedy=remedy,
            )
        return raw
    if (claimed := raw.pop(DIGEST)) != digest(raw):
        raise BadInput(
            path,
            found="damaged or edited: not the content it was written with",
            expected=f"content of SHA-256 {claimed!r:.16}",
            remedy=remedy,
        )
    return raw


def validated(path: Path, kind: TypeAdapter[T], raw: Any, remedy: str) -> T:
    """``raw`` as a value of ``kind``.

    Raises:
        BadInput: it is none; the message names the first place at fault.
    """
    try:
        return kind.validate_python(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "content"
        words = f"{place}: {first['msg']}"
        words = words if words.isprintable() else ascii(words)
        raise BadInput(path, found=words[:200], remedy=remedy) from None


def read_whole(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: not a readable regular file.
        ValueError: larger than `LIMIT`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LIMIT:
            raise ValueError(f"larger than {LIMIT} bytes")
        return file.read(size)  # reserves this much memory, so it was checked first


def parse_json(data: bytes) -> Any:
    """JSON in UTF-8 without repeated keys.

    Raises:
        ValueError: anything else.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    merged = dict(pairs)
    if len(merged) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return merged
