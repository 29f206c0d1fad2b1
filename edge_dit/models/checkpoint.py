"""A transformer on disk, read lazily: only the blocks that are asked for are loaded.

Weights stored as float32 are memory-mapped views of the file; others are converted tensor by
tensor. So memory holds the blocks in use and nothing else of the model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from edge_dit.errors import BadInput
from edge_dit.models.families.family import Family
from edge_dit.models.pipeline import quiet

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SINGLE = "diffusion_pytorch_model.safetensors"
REMEDY = "save or download the transformer again"


class Checkpoint:
    """The weights of a transformer; only the headers of its files are read at first.

    Args:
        family: of the transformer.
        folder: with its weights, in one safetensors file or in shards with an index.
        config: of the transformer.

    Raises:
        BadInput: no weights, a missing or damaged shard, an index that names absent tensors, or
            tensors that do not fit the configuration.
    """

    def __init__(self, family: Family, folder: Path, config: dict[str, Any]) -> None:
        self.family, self.folder, self.config = family, folder, config
        self.names = family.block_names(config)
        stored = _tensors(folder)
        self._file_of = {name: tensor.file for name, tensor in stored.items()}
        self._meta = meta_model(family, config)
        self._check(stored)
        self._blocks = family.blocks(self._meta)

    def skeleton(self) -> nn.Module:
        """The model in float32 with its blocks on the meta device; embeddings and head work."""
        # Without blocks it is small; buffers that no file holds are computed as it is built.
        model = build(self.family, {**self.config, **dict.fromkeys(self._counts, 0)})
        outside = [name for name, _ in model.named_parameters()]
        outside += [name for name in model.state_dict() if name not in outside]
        model.load_state_dict(self._read({name: name for name in outside}), assign=True)
        model.register_to_config(**{key: self.config[key] for key in self._counts})  # type: ignore[operator]
        for container in self.family.containers:
            setattr(model, container, copy.deepcopy(getattr(self._meta, container)))
        return model.eval().requires_grad_(False)

    def model(self, numbers: Iterable[int]) -> nn.Module:
        """The `skeleton`, with the weights of the blocks ``numbers`` loaded."""
        model = self.skeleton()
        blocks = self.family.blocks(model)
        for number in numbers:
            name = self.names[number]
            self._fill(blocks[name], name)
        return model

    @contextmanager
    def block(self, number: int) -> Iterator[nn.Module]:
        """Block ``number`` in float32; its weights are freed when the context ends."""
        name = self.names[number]
        block = copy.deepcopy(self._blocks[name])
        self._fill(block, name)
        yield block.eval().requires_grad_(False)

    def _check(self, stored: dict[str, _Stored]) -> None:
        """Raise `BadInput` unless every tensor of the configuration is stored in its shape."""
        expected = self._meta.state_dict()
        missing = sorted(expected.keys() - stored.keys())
        if missing:
            raise BadInput(
                self.folder,
                found=f"{len(missing)} tensors of the model are in no file, first {missing[0]}",
                expected=f"all {len(expected)} of its configuration",
                remedy=REMEDY,
            )
        for name, tensor in expected.items():
            if stored[name].shape != tensor.shape:
                raise BadInput(
                    stored[name].file,
                    found=f"{name} of shape {list(stored[name].shape)}",
                    expected=f"{list(tensor.shape)}, by config.json",
                    remedy=REMEDY,
                )

    @property
    def _counts(self) -> tuple[str, ...]:
        return tuple(self.family.containers.values())

    def _fill(self, block: nn.Module, name: str) -> None:
        tensors = self._read({f"{name}.{key}": key for key in block.state_dict()})
        block.load_state_dict(tensors, assign=True)
        block.requires_grad_(False)

    def _read(self, names: dict[str, str]) -> dict[str, Tensor]:
        """Tensors in float32 under new names.

        Args:
            names: name in the file -> name in the result.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file_of[name], []).append(name)
        tensors = {}
        for path, wanted in by_file.items():
            try:
                with safe_open(path, framework="pt") as file:
                    for name in wanted:
                        tensors[names[name]] = file.get_tensor(name).to(torch.float32)
            except (OSError, SafetensorError) as error:
                raise BadInput(path, found=f"damaged ({error})", remedy=REMEDY) from None
        return tensors


def meta_model(family: Family, config: dict[str, Any]) -> nn.Module:
    """A model of ``config`` on the meta device: it has shapes and takes no memory.

    Raises:
        BadInput: diffusers cannot build it.
    """
    with torch.device("meta"):
        return build(family, config)


def build(family: Family, config: dict[str, Any]) -> nn.Module:
    """A model of ``config`` with random weights, float32, on torch's default device.

    Raises:
        BadInput: diffusers cannot build it.
    """
    with quiet():
        import diffusers

        try:
            return getattr(diffusers, family.transformer).from_config(config)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise BadInput(
                "transformer/config.json",
                found=f"diffusers cannot build it: {error}",
                expected=f"a configuration of {family.transformer}",
            ) from None


class _Stored(NamedTuple):
    """File that stores a tensor, and the shape it is stored in."""

    file: Path
    shape: tuple[int, ...]


def _tensors(folder: Path) -> dict[str, _Stored]:
    """Every tensor of a transformer's folder by name."""
    if (folder / INDEX).is_file():
        return _sharded(folder / INDEX)
    if (folder / SINGLE).is_file():
        return _stored_in(folder / SINGLE)
    raise BadInput(
        folder, found="no weights", expected=f"{SINGLE}, or shards with {INDEX}", remedy=REMEDY
    )


def _sharded(index: Path) -> dict[str, _Stored]:
    """The tensors that an index of shards names."""
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): index.parent / Path(str(file)).name for name, file in named.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(index, found=f"unreadable ({error!r})", remedy=REMEDY) from None
    shards = sorted(set(files.values()))
    absent = [path.name for path in shards if not path.is_file()]
    if absent:
        raise BadInput(
            index.parent,
            found=f"{len(absent)} of {len(shards)} shards are missing: {', '.join(absent[:3])}",
            expected="every file that its index names",
            remedy="finish the download",
        )
    tensors = {}
    for shard in shards:
        held = _stored_in(shard)
        wanted = [name for name, file in files.items() if file == shard]
        missing = sorted(set(wanted) - held.keys())
        if missing:
            raise BadInput(
                index,
                found=f"{len(missing)} tensors that {shard.name} does not hold, first {missing[0]}",
                expected="the index of these shards",
                remedy=REMEDY,
            )
        tensors |= {name: held[name] for name in wanted}
    return tensors


def _stored_in(path: Path) -> dict[str, _Stored]:
    """The tensors of one file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {
                name: _Stored(path, tuple(file.get_slice(name).get_shape()))
                for name in file.keys()  # noqa: SIM118
            }
    except (OSError, SafetensorError) as error:
        raise BadInput(path, found=f"damaged ({error})", remedy=REMEDY) from None
