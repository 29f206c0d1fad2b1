"""A diffusers pipeline folder, opened: which family it is, and its configurations.

A stage opens its model once and hands it on. Weights stay on disk until `Model.checkpoint` reads
them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_dit.errors import require
from edge_dit.models.components import Pipeline
from edge_dit.models.families import detect, family_of

if TYPE_CHECKING:
    from torch import nn

    from edge_dit.contract.objective import Objective
    from edge_dit.models.checkpoint import Checkpoint
    from edge_dit.models.families.family import Family


@dataclass(frozen=True)
class Model:
    """A pipeline folder of a supported family. What is not needed is not read.

    Attributes:
        family: what edge-dit knows of this kind of transformer.
        folder: the diffusers folder.
        config: configuration of the transformer.
        variant: of the weights, where a component has it ("fp16"); None for those without one.
    """

    family: Family
    folder: Path
    config: dict[str, Any]
    variant: str | None = None

    @property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.family.block_names(self.config))

    @cached_property
    def multiple(self) -> int:
        """Pixels per side of a token.

        Raises:
            BadInput: the autoencoder's configuration is missing or of another class.
        """
        return self.family.multiple(self.config, self.family.vae_config(self.folder))

    @property
    def size_step(self) -> int:
        """Pixels that sides of patches and pictures are a multiple of."""
        return self.multiple * self.family.token_step

    @cached_property
    def objective(self) -> Objective:
        """What the transformer is trained to predict, by the scheduler's configuration.

        Raises:
            BadInput: the scheduler's configuration is missing or does not fit the family.
        """
        from edge_dit.models.families.family import scheduler_config

        return self.family.objective(scheduler_config(self.folder))

    @cached_property
    def hash(self) -> str:
        """SHA-256 over every file that is loaded and its path in the folder, hexadecimal.

        Which files those are is `edge_dit.models.components.Pipeline.files`.
        """
        from edge_dit.models.weights import hash_of, keep_measured

        digest = hashlib.sha256()
        for file in Pipeline(self.folder, self.variant).files():
            name = file.relative_to(self.folder).as_posix()
            digest.update(f"{name} {hash_of(file)}\n".encode())
        keep_measured()
        return digest.hexdigest()

    def meta(self) -> nn.Module:
        """The transformer on the meta device: it has shapes and takes no memory.

        Raises:
            BadInput: diffusers cannot build it.
        """
        from edge_dit.models.checkpoint import meta_model

        return meta_model(self.family, self.config)

    def checkpoint(self, held: str = "float32") -> Checkpoint:
        """The transformer's weights, read block by block.

        Args:
            held: dtype that a device stores matrices as, see `Checkpoint`.

        Raises:
            BadInput: weights are missing, damaged, quantised, or not the configuration's.
        """
        from edge_dit.models.checkpoint import Checkpoint

        folder = self.folder / "transformer"
        return Checkpoint(self.family, folder, self.config, self.variant, held)


def open_model(folder: Path, variant: str | None = None) -> Model:
    """Open a diffusers pipeline folder (imports torch).

    Args:
        folder: of the pipeline.
        variant: of the weights, as diffusers names it ("fp16").

    Raises:
        BadInput: it is not such a folder, no family supports its pipeline, or the transformer's
            configuration is missing or of another class.
    """
    name = detect(folder)
    require("torch", "reading a model")
    family = family_of(name)
    return Model(family, folder, family.config(folder), variant)
