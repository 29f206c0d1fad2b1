"""job.toml: what a user asks for. All faults of a file are reported together."""

from __future__ import annotations

import re
import reprlib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from edge_dit.contract.bundle import TARGETS
from edge_dit.errors import BadInput, ManyFaults
from edge_dit.store.documents import read_whole
from edge_dit.text import seconds_of

SIZE = re.compile(r"\s*\d{1,12}(\.\d{1,12})?\s*[kmgt]i?b\s*", re.IGNORECASE | re.ASCII)
"""A size with its unit. `ByteSize` alone also takes "3" for three bytes and "3Gbit" for bits, and
reads only the beginning of "3 GiB free".
"""
_SIZES = TypeAdapter(ByteSize)


def bytes_of(text: object) -> ByteSize:
    """Bytes of "3GiB", "200 MiB", "1.5GB".

    Raises:
        ValueError: something else, or zero.
    """
    if SIZE.fullmatch(str(text)) and (found := _SIZES.validate_python(str(text))):
        return found
    raise ValueError("a size such as 3GiB, 200MiB or 1.5GB")


Positive = Annotated[int, Field(ge=1)]
Size = Annotated[ByteSize, BeforeValidator(bytes_of)]
Seconds = Annotated[float, BeforeValidator(seconds_of)]
DOTS = 1000
"""Dots in a job file at most: tomllib keeps every prefix of a dotted key, so that a key of 20,000
parts, 40 KB, took 1.6 GB and 10 s.
"""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Section):
    """[model]: ``path`` of a diffusers pipeline folder, relative to the job file."""

    path: Path


class Data(_Section):
    """[data]: a folder of images, relative to the job file, and the prompt of every image that has
    no side-car .txt caption.
    """

    images: Path
    prompt: str | None = None


class PlanOptions(_Section):
    """[plan]: the share of blocks to skip, or how many at each end; ``inner_skips`` are further
    runs [first, end), between trained blocks. Or a budget, see `edge_dit.budget.search`: ``ram``
    and ``flash`` as sizes ("3GiB"), ``step_time`` in seconds ("5s").
    """

    skip_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5
    head_skip: Annotated[int, Field(ge=0)] | None = None
    tail_skip: Annotated[int, Field(ge=0)] | None = None
    inner_skips: list[tuple[int, int]] = []
    ram: Size | None = None
    flash: Size | None = None
    step_time: Seconds | None = None


class Train(_Section):
    """[train]: ``resolution`` is s_max and ``patch`` s_min of Eq. 1, in pixels; ``draws`` is the
    size of the bank and ``bank`` the dtype its large tensors are stored in; ``lora_targets`` names
    modules within a block, default the family's.
    """

    resolution: Positive
    patch: Positive
    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] | None = None
    lora_targets: Annotated[list[str], Field(min_length=1)] | None = None
    lr: Annotated[float, Field(gt=0)] = 1e-4
    steps: Positive = 500
    draws: Positive = 256
    bank: Literal["float32", "float16"] = "float32"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class Export(_Section):
    """[export]: the targets to export, and how the onnx target stores frozen matrices: as float32
    for all its layouts, as float16 or int8 (a scale per output channel) for the streamed one only;
    with ``recompute`` there is a layout that computes each block again for its gradients.
    """

    targets: Annotated[list[str], Field(min_length=1)] = list(TARGETS)
    weights: Literal["float32", "float16", "int8"] = "float32"
    recompute: bool = False


class Job(_Section):
    """A job file, paths resolved."""

    model: Model
    data: Data
    plan: PlanOptions = PlanOptions()
    train: Train
    export: Export = Export()


REMEDIES = {
    "extra_forbidden": "remove it, or correct its spelling",
    "missing": "add it",
}


def read_job(path: Path) -> Job:
    """Read and check a job file.

    Raises:
        BadInput: unreadable, not TOML, or (as `ManyFaults`) every fault with its line.
    """
    try:
        text = read_whole(path).decode("utf-8")
    except (OSError, ValueError) as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else f"unreadable ({error})"
        raise BadInput(
            path, found=found, expected="a job file (TOML)", remedy="see samples/sana.toml"
        ) from None
    if (dots := text.count(".")) > DOTS:
        raise BadInput(
            path,
            found=f"{dots} dots",
            expected=f"a job file (TOML), with at most {DOTS}",
            remedy="see samples/sana.toml; captions go into .txt files beside the images",
        )
    try:
        raw = tomllib.loads(text)
    except ValueError as error:  # tomllib's own, or a number of thousands of digits
        raise BadInput(path, found=f"not valid TOML: {error}") from None
    except RecursionError:
        raise BadInput(path, found="nested too deep", expected="a job file (TOML)") from None
    faults: list[BadInput] = []
    job = None
    try:
        job = Job.model_validate(raw)
    except ValidationError as error:
        faults = [_fault(path, text, detail) for detail in error.errors()]
    faults += _relations(path, text, raw) + _paths(path, text, raw)
    if faults:
        raise faults[0] if len(faults) == 1 else ManyFaults(path, faults)
    assert job is not None
    return _resolve(job, path.parent)


def _fault(path: Path, text: str, detail: Any) -> BadInput:
    """A pydantic error as a fault of the file, with its line."""
    keys = [part for part in detail["loc"] if isinstance(part, str)]
    found = {
        "extra_forbidden": f"unknown key {'.'.join(keys)}",
        "missing": f"{'.'.join(keys)} is missing",
    }.get(detail["type"], f"{'.'.join(keys)} = {reprlib.repr(detail['input'])}")
    expected = "" if detail["type"] in REMEDIES else detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        expected = f"one of {', '.join(_known_keys(keys[:-1]))}"
    return BadInput(
        _place(path, text, keys),
        found=found,
        expected=expected,
        remedy=REMEDIES.get(detail["type"], ""),
    )


def _known_keys(section: list[str]) -> list[str]:
    model: Any = Job
    for key in section:
        model = model.model_fields[key].annotation
    return list(model.model_fields)


def _place(path: Path, text: str, keys: list[str]) -> str:
    """``path:line`` of a key, of its section where the key is not there, else ``path``."""
    section, line_of = [], {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]+", line):
            section = header.group(1).split(".")
            line_of[tuple(section)] = number
        elif entry := re.match(r"\s*([\w.\-\"']+)\s*=", line):
            key = entry.group(1).replace('"', "").replace("'", "").split(".")
            line_of[(*section, *key)] = number
    for end in range(len(keys), 0, -1):
        if tuple(keys[:end]) in line_of:
            return f"{path}:{line_of[tuple(keys[:end])]}"
    return str(path)


def _relations(path: Path, text: str, raw: dict[str, Any]) -> list[BadInput]:
    """Faults between keys; looked for even where keys are wrong, so that all come at once."""
    faults = []

    def section(name: str) -> dict[str, Any]:
        value = raw.get(name)
        return value if isinstance(value, dict) else {}

    train = section("train")
    patch, resolution = train.get("patch"), train.get("resolution")
    if isinstance(patch, int) and isinstance(resolution, int) and patch > resolution:
        faults.append(
            BadInput(
                _place(path, text, ["train", "patch"]),
                found=f"train.patch (s_min) = {patch} is larger than train.resolution (s_max) = "
                f"{resolution}",
                expected="patch <= resolution, in pixels",
                remedy="make patch smaller, e.g. half the resolution",
            )
        )
    budget = sorted({"ram", "flash", "step_time"} & section("plan").keys())
    fixed = sorted({"skip_ratio", "inner_skips"} & section("plan").keys())
    if budget and fixed:
        faults.append(
            BadInput(
                _place(path, text, ["plan", fixed[0]]),
                found=f"plan.{fixed[0]} beside plan.{budget[0]}",
                expected="either which blocks to skip, or a budget that decides it",
                remedy=f"remove one; head_skip and tail_skip may stay beside {budget[0]}",
            )
        )
    targets = section("export").get("targets")
    unknown = [t for t in targets if t not in TARGETS] if isinstance(targets, list) else []
    if unknown:
        faults.append(
            BadInput(
                _place(path, text, ["export", "targets"]),
                found=f"unknown target {', '.join(map(repr, unknown))}",
                expected=f"one of {', '.join(TARGETS)}",
            )
        )
    return faults


def _resolve(job: Job, base: Path) -> Job:
    return job.model_copy(
        update={
            "model": Model(path=(base / job.model.path).resolve()),
            "data": Data(images=(base / job.data.images).resolve(), prompt=job.data.prompt),
        }
    )


def _paths(path: Path, text: str, raw: dict[str, Any]) -> list[BadInput]:
    """Folders that are not there."""
    faults = []
    for section, key, what in (
        ("model", "path", "a diffusers pipeline folder"),
        ("data", "images", "a folder of images"),
    ):
        value = raw.get(section)
        value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, str) and not _is_folder(path.parent / value):
            faults.append(
                BadInput(
                    _place(path, text, [section, key]),
                    found=f"{section}.{key}: no folder {(path.parent / value).absolute()}",
                    expected=what,
                    remedy="paths are relative to the job file",
                )
            )
    return faults


def _is_folder(path: Path) -> bool:
    """Whether a folder is there; a name that no folder can have is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
