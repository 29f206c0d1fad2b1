"""A transformer on disk, read lazily: only the blocks that are asked for are loaded.

Weights stored as float32 are memory-mapped views of the file; others are converted tensor by
tensor. So memory holds the blocks in use and nothing else of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from edge_dit.errors import raise_any
from edge_dit.models.components import (
    check_depth,
    check_quantisation,
    file_names,
    refusing,
    weights_of,
)
from edge_dit.models.families.family import Family
from edge_dit.models.pipeline import quiet
from edge_dit.models.quantize import round_frozen
from edge_dit.models.weights import misfits, stored_in

INDEX, SINGLE = file_names("diffusers")


class Checkpoint:
    """The weights of a transformer; only the headers of its files are read at first.

    Args:
        family: of the transformer.
        folder: with its weights, in one safetensors file or in shards with an index.
        config: of the transformer.
        variant: of the weights, see `edge_dit.models.components.weights_of`.
        held: dtype that a device stores matrices as; `block` rounds them to it.

    Raises:
        BadInput: no weights, a missing or damaged shard, an index that names absent tensors, a
            quantised checkpoint, or tensors that are not those of the configuration.
    """

    def __init__(
        self,
        family: Family,
        folder: Path,
        config: dict[str, Any],
        variant: str | None = None,
        held: str = "float32",
    ) -> None:
        self.family, self.folder, self.config, self.held = family, folder, config, held
        stored = stored_in(weights_of(folder, "diffusers", variant))
        self._file_of = {name: tensor.file for name, tensor in stored.items()}
        path = folder / "config.json"
        check_quantisation(path, config)
        check_depth(path, config)
        self._meta = meta_model(family, config, path)
        raise_any(folder, misfits(stored, self._meta.state_dict(), folder))
        self.names = family.block_names(config)
        self._blocks = family.blocks(self._meta)

    def skeleton(self, outside: bool = True) -> nn.Module:
        """The model in float32 with its blocks on the meta device; embeddings and head work.

        Args:
            outside: whether they do; if not, only in `outside`.
        """
        # Buffers that no file holds are computed as it is built; some depend on the blocks' number.
        with _on_meta(nn.Linear, *{type(block) for block in self._blocks.values()}):
            model = build(self.family, self.config)
        if outside:
            self._load_outside(model)
        else:
            self._free_outside(model)
        return model.eval().requires_grad_(False)

    @contextmanager
    def outside(self, skeleton: nn.Module) -> Iterator[None]:
        """A context in which embeddings and head of a skeleton work; after it they take no memory,
        which is more than a block in FLUX.2, whose blocks share their modulations.
        """
        self._load_outside(skeleton)
        try:
            yield
        finally:
            self._free_outside(skeleton)

    def _outside(self, model: nn.Module) -> list[str]:
        blocks = tuple(f"{name}." for name in self.names)
        return [name for name in model.state_dict() if not name.startswith(blocks)]

    def _load_outside(self, model: nn.Module) -> None:
        tensors = self._read({name: name for name in self._outside(model)})
        model.load_state_dict(tensors, strict=False, assign=True)
        model.requires_grad_(False)

    def _free_outside(self, model: nn.Module) -> None:
        held = model.state_dict()
        freed = {name: held[name].to("meta") for name in self._outside(model)}
        model.load_state_dict(freed, strict=False, assign=True)
        model.requires_grad_(False)

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
        round_frozen(block, self.held)
        yield block.eval().requires_grad_(False)

    def tensor(self, name: str) -> Tensor:
        """A tensor in float32, by its name in the model."""
        return self._read({name: name})[name]

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
            with (
                refusing(path, "damaged", "a whole safetensors file"),
                safe_open(path, framework="pt") as file,
            ):
                for name in wanted:
                    tensors[names[name]] = file.get_tensor(name).to(torch.float32)
        return tensors


@contextmanager
def _on_meta(*kinds: type[nn.Module]) -> Iterator[None]:
    """A context in which modules of some classes are built on the meta device."""
    stock = {kind: kind.__init__ for kind in kinds}

    def built(kind: type[nn.Module]) -> Any:
        @wraps(stock[kind])
        def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            with torch.device("meta"):
                stock[kind](self, *args, **kwargs)

        return init

    for kind in kinds:
        kind.__init__ = built(kind)
    try:
        yield
    finally:
        for kind, init in stock.items():
            kind.__init__ = init


def meta_model(
    family: Family, config: dict[str, Any], where: object = "transformer/config.json"
) -> nn.Module:
    """A model of ``config`` on the meta device: it has shapes and takes no memory.

    Args:
        family: of the transformer.
        config: of the transformer.
        where: the configuration was read, for the message.

    Raises:
        BadInput: diffusers cannot build it.
    """
    with torch.device("meta"):
        return build(family, config, where)


def build(
    family: Family, config: dict[str, Any], where: object = "transformer/config.json"
) -> nn.Module:
    """A model of ``config`` with random weights, float32, on torch's default device.

    Args:
        family: of the transformer.
        config: of the transformer.
        where: the configuration was read, for the message.

    Raises:
        BadInput: diffusers cannot build it.
    """
    with quiet():
        import diffusers

        with refusing(
            where,
            found="diffusers cannot build it",
            expected=f"a configuration of {family.transformer}",
        ):
            return getattr(diffusers, family.transformer).from_config(config)
