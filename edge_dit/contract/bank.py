"""The bank: stored draws, readable one at a time by memory map.

    index.json                the plan, images and prompts it is made of, and every draw
    prompts.safetensors       "<prompt>.<tensor>": what depends on the prompt alone
    shard-00000.safetensors   "<draw>.<tensor>" of the first draws; then shard-00001 and so on

The seed decides all draws, so the index is complete before anything is computed. A shard file is
always whole, so a stopped run continues with the first missing one. Every other file names the
index it belongs to, and carries the digests of `edge_dit.store.tensors`, which are checked when a
draw is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter

from edge_dit.contract.names import (
    COND,
    ENTRY,
    ENTRY_TEXT,
    OUTSIDE,
    RESIDUAL,
    RESIDUAL_TEXT,
    TAIL_RESIDUAL,
    TARGET,
)
from edge_dit.contract.noise import permutation
from edge_dit.errors import BadInput
from edge_dit.store.documents import STRICT, read_document, validated, write_document
from edge_dit.store.files import sha256
from edge_dit.store.tensors import TensorFile, write_tensors

SCHEMA = 2
"""2: noise, crops and order by `edge_dit.contract.noise`; 1 had torch's and numpy's."""
SHARD = 64
"""Default number of draws in a shard: a few megabytes, so that a stopped run loses only seconds."""
HALVED = (ENTRY, ENTRY_TEXT, TAIL_RESIDUAL, TARGET, RESIDUAL, RESIDUAL_TEXT)
"""Tensors that grow with the patch, by their names up to the first dot."""
HALVED_OUTSIDE = tuple(COND + OUTSIDE + what for what in ("edge", "keys", "values"))
"""Beginnings of the names of others that do."""
INDEX = "index.json"
PROMPTS = "prompts.safetensors"


Natural = Annotated[int, Field(ge=0)]
Dtype = Literal["float32", "float16"]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Crop:
    """A square crop in pixels: top-left corner and side."""

    top: int
    left: int
    side: int


@dataclass(frozen=True)
class Draw:
    """One training example: an image, a prompt, a noise level, a crop and the seed of its noise.

    Attributes:
        seed: of this draw's noise and crop position.
        image: number of the image in the index.
        prompt: number of the prompt in the index.
        sigma: noise level in (0, 1].
        u, v: crop position, see `edge_dit.pictures.crop.CropRule`.
        crop: the resulting crop in pixels of the resized image.
    """

    __pydantic_config__ = STRICT
    seed: Natural
    image: Natural
    prompt: Natural
    sigma: Share
    u: Share
    v: Share
    crop: Crop


@dataclass(frozen=True)
class Listed:
    """A picture that draws are made of. Values that are their defaults are not written.

    Attributes:
        name: of its file.
        sha256: of its file.
        prompts: numbers of its captions in the index, where it has several or may have none; a
            picture with one caption has it in its draws alone.
        dropout: share of its draws that have the empty prompt.
        repeats: turns it has while a picture without repeats has one.
        weight: of its loss.
        prior: whether its draws keep what the base model predicts.
        mask: SHA-256 of the file of its loss mask; "alpha": its alpha channel is the mask.
    """

    __pydantic_config__ = STRICT
    name: str
    sha256: str
    prompts: tuple[Natural, ...] = ()
    dropout: Share = 0.0
    repeats: Annotated[int, Field(ge=1)] = 1
    weight: Annotated[float, Field(gt=0)] = 1.0
    prior: bool = False
    mask: str = ""


@dataclass(frozen=True)
class Index:
    """The content of index.json.

    Attributes:
        plan_hash: `edge_dit.planning.plan.Plan.identity` of the plan.
        images: each picture; with a prior, those of prior draws come last.
        prompts: distinct prompts.
        draws: all draws.
        shard: number of draws in a shard.
        dtype: of the tensors that grow with the patch, "float32" or "float16".
    """

    __pydantic_config__ = STRICT
    plan_hash: str
    images: list[Listed]
    prompts: list[str]
    draws: list[Draw]
    shard: Annotated[int, Field(ge=1, le=2**20)] = SHARD
    dtype: Dtype = "float32"
    schema_version: int = SCHEMA

    @property
    def shards(self) -> int:
        """Number of shards of the complete bank."""
        return -(-len(self.draws) // self.shard)

    def members(self, shard: int) -> range:
        """Numbers of the draws in a shard."""
        return range(shard * self.shard, min((shard + 1) * self.shard, len(self.draws)))

    def as_json(self) -> dict[str, Any]:
        """The document."""
        return {**asdict(self), "images": [_without_defaults(image) for image in self.images]}


def _without_defaults(listed: Listed) -> dict[str, Any]:
    """A picture's entry: so that a bank that uses none of the rest is that of earlier versions."""
    values = asdict(listed)
    default = {field.name: field.default for field in fields(Listed)}
    return {k: v for k, v in values.items() if default[k] is MISSING or v != default[k]}


def shard_path(folder: Path, shard: int) -> Path:
    """File of a shard."""
    return folder / f"shard-{shard:05d}.safetensors"


def begin(folder: Path, index: Index) -> list[int]:
    """Start a bank or continue one; the numbers of the shards that are still missing.

    Raises:
        BadInput: the folder holds another bank, or something else.
    """
    path = folder / INDEX
    if path.is_file():
        if read_index(folder) != index:
            raise BadInput(
                folder,
                found="a bank of another plan, other images or other prompts",
                expected="the bank of this job and plan, to continue it",
                remedy="choose another -o, or remove the folder",
            )
    elif folder.exists() and (
        not folder.is_dir() or any(p.name[0] != "." for p in folder.iterdir())
    ):
        raise BadInput(
            folder,
            found="not empty, and not a bank",
            expected="a new or empty folder",
            remedy="choose another -o",
        )
    else:
        write_document(path, index.as_json())
    return missing_shards(folder, index)


def missing_shards(folder: Path, index: Index) -> list[int]:
    """Numbers of the shards that a bank lacks."""
    return [s for s in range(index.shards) if not shard_path(folder, s).is_file()]


def write_prompts(folder: Path, prompts: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Write the tensors that depend on the prompt alone; item n belongs to prompt n."""
    _write(folder / PROMPTS, dict(enumerate(prompts)))


def write_shard(folder: Path, shard: int, draws: Mapping[int, Mapping[str, np.ndarray]]) -> None:
    """Write the tensors of a shard's draws, by draw number."""
    _write(shard_path(folder, shard), draws)


def is_halved(name: str) -> bool:
    """Whether a float16 bank stores a tensor in float16: one that grows with the patch."""
    return name.partition(".")[0] in HALVED or name.startswith(HALVED_OUTSIDE)


def narrowed(draw: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """A draw as a bank of ``dtype`` stores it; a tensor beyond float16's range stays float32."""
    largest = np.finfo(np.float16).max

    def halved(name: str, value: np.ndarray) -> bool:
        return is_halved(name) and bool(np.abs(value).max() <= largest)

    return {
        name: value.astype(np.float16) if dtype == "float16" and halved(name, value) else value
        for name, value in draw.items()
    }


def _write(path: Path, items: Mapping[int, Mapping[str, np.ndarray]]) -> None:
    tensors = {f"{n}.{name}": v for n, named in items.items() for name, v in named.items()}
    write_tensors(path, tensors, {"index": sha256(path.parent / INDEX)})


def read_index(folder: Path) -> Index:
    """A bank's index; the bank may be incomplete.

    Raises:
        BadInput: missing, damaged, or of another schema.
    """
    path = folder / INDEX
    remedy = "make it: edge-dit precompute JOB --plan plan.json -o bank/"
    raw = read_document(path, "a bank folder", remedy, SCHEMA)
    index = validated(path, TypeAdapter(Index), raw, remedy)
    if any(draw.prompt >= len(index.prompts) for draw in index.draws):
        raise BadInput(path, found="a draw has a prompt that it does not list", remedy=remedy)
    return index


def draw_order(step: int, draws: int, seed: int) -> int:
    """Number of the draw that a step trains on: every epoch is a permutation of the bank.

    Args:
        step: from 0.
        draws: number of draws in the bank.
        seed: the plan's seed.
    """
    epoch, position = divmod(step, draws)
    return int(permutation(draws, seed, epoch)[position])


class Bank:
    """A complete bank, opened for reading.

    Args:
        folder: as written by precompute.
        plan_hash: of the plan that the bank must belong to; None accepts any.

    Attributes:
        identity: SHA-256 of index.json; every other file of the bank names it.

    Raises:
        BadInput: not a bank, incomplete, or of another plan.
    """

    def __init__(self, folder: Path, plan_hash: str | None = None) -> None:
        self.folder = folder
        self.index = read_index(folder)
        self.identity = sha256(folder / INDEX)
        self._files: dict[Path, TensorFile] = {}
        if plan_hash is not None and self.index.plan_hash != plan_hash:
            raise BadInput(
                folder,
                found="a bank that belongs to another plan",
                expected=f"plan {plan_hash[:12]}, found {self.index.plan_hash[:12]}",
                remedy="precompute again with the plan the bundle was exported for",
            )
        wanted = [folder / PROMPTS, *(shard_path(folder, s) for s in range(self.index.shards))]
        missing = [path.name for path in wanted if not path.is_file()]
        if missing:
            raise BadInput(
                folder,
                found=f"incomplete: {len(missing)} of {len(wanted)} files missing ({missing[0]})",
                remedy="run the same edge-dit precompute again; it continues where it stopped",
            )

    def __len__(self) -> int:
        return len(self.index.draws)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """The batch tensors of a draw, float32, by the names that exported graphs use."""
        draw = self.index.draws[number]
        shard = self._read(shard_path(self.folder, number // self.index.shard), number)
        return {**self._prompts[draw.prompt], **shard}

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    def number(self, step: int, seed: int) -> int:
        """Number of the draw that a step trains on, see `draw_order`."""
        return draw_order(step, len(self), seed)

    def draw(self, number: int) -> Draw:
        """What a draw is made of."""
        return self.index.draws[number]

    def shapes(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """Names and shapes of each draw's tensors, by the files' headers; no tensor is read.

        Raises:
            BadInput: a file is damaged.
        """
        of_prompt = self._shapes(self.folder / PROMPTS)
        for shard in range(self.index.shards):
            of_draw = self._shapes(shard_path(self.folder, shard))
            for number in self.index.members(shard):
                prompt = self.index.draws[number].prompt
                yield {**of_prompt.get(prompt, {}), **of_draw.get(number, {})}

    def _shapes(self, path: Path) -> dict[int, dict[str, tuple[int, ...]]]:
        """Number of a draw or prompt -> names and shapes of its tensors in a file."""
        shapes: dict[int, dict[str, tuple[int, ...]]] = {}
        try:
            for name, place in self._file(path).header.tensors.items():
                number, _, tensor = name.partition(".")
                shapes.setdefault(int(number), {})[tensor] = place.shape
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from None
        return shapes

    def in_words(self, number: int) -> str:
        """A draw for a message: "draw 3 (image dog.png, sigma 0.512)"."""
        draw = self.index.draws[number]
        images = self.index.images
        name = images[draw.image].name if draw.image < len(images) else draw.image
        return f"draw {number} (image {name}, sigma {draw.sigma:.3f})"

    @cached_property
    def _prompts(self) -> list[dict[str, np.ndarray]]:
        path = self.folder / PROMPTS
        return [self._read(path, n, may_lack=True) for n in range(len(self.index.prompts))]

    def _read(self, path: Path, number: int, may_lack: bool = False) -> dict[str, np.ndarray]:
        """The float32 tensors of a draw or prompt; only its own bytes are read and checked.

        Args:
            path: a shard, or the prompts.
            number: of the draw or prompt.
            may_lack: whether it may have no tensors; in some families nothing depends on the
                prompt alone.
        """
        prefix = f"{number}."
        try:
            file = self._file(path)
            stored = file.read(name for name in file.header.tensors if name.startswith(prefix))
            if not stored and not may_lack:
                raise ValueError(f"no item {number}")
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from None
        return {
            name.removeprefix(prefix): value.astype(np.float32, copy=False)
            for name, value in stored.items()
        }

    def _file(self, path: Path) -> TensorFile:
        if path not in self._files:
            file = TensorFile(path)
            if not file.header.hashed:
                raise ValueError("it has no digests")
            if file.header.metadata.get("index") != self.identity:
                raise ValueError("it belongs to another bank")
            self._files[path] = file
        return self._files[path]


def _damaged(path: Path, error: Exception) -> BadInput:
    remedy = "remove it and run the same edge-dit precompute again"
    return BadInput(path, found=f"damaged ({error})", remedy=remedy)
