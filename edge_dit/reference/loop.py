"""PyTorch's results for the loop's parts, to compare a device's with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_dit.contract.bank import Draw
from edge_dit.contract.loop import TILE
from edge_dit.models.checkpoint import Checkpoint
from edge_dit.models.families.family import Prompt
from edge_dit.models.model import Model
from edge_dit.models.patch_sampler import PatchSampler
from edge_dit.models.subgraph import TrainableSubgraph
from edge_dit.pictures.dataset import Captioned
from edge_dit.pictures.tiles import tiled
from edge_dit.planning.plan import Plan
from edge_dit.reference.precompute import Source, passed, tensors_of


@dataclass(frozen=True)
class WholeModel:
    """A model with its parts.

    Attributes:
        plan: of the bundle.
        model: of the plan.
        checkpoint: its transformer's weights, rounded as the device holds them.
        skeleton: its transformer, blocks on the meta device.
        vae: its autoencoder, rounded likewise.
        trained: its trained blocks, with the LoRA that painting is tried with.
    """

    plan: Plan
    model: Model
    checkpoint: Checkpoint
    skeleton: Any
    vae: Any
    trained: TrainableSubgraph

    def collected(
        self, image: Captioned, prompt: Prompt, draws: Sequence[Draw]
    ) -> list[dict[str, np.ndarray]]:
        """Batch tensors of a picture's draws, as a bank has them."""
        plan = self.plan
        sampler = PatchSampler(plan.crop_rule)
        source = Source(
            self.model,
            self.skeleton,
            self.vae,
            sampler,
            plan.passing_grid,
            {0: image},
            {0: prompt},
            plan.tile,
            plan.weighted,
            plan.masked,
            windows=plan.window_rule,
        )
        starts = [source.start(draw) for draw in draws]
        kept = passed(plan, self.checkpoint, starts, _silent)
        return [
            tensors_of(plan, source, self.checkpoint.names, *pair)
            for pair in zip(starts, kept, strict=True)
        ]

    @torch.no_grad()
    def predictions(
        self, latents: np.ndarray, prompts: Mapping[int, Prompt], timesteps: Sequence[float]
    ) -> dict[tuple[int, int], np.ndarray]:
        """Predictions of a whole picture by (number of the timestep, number of the prompt).

        Args:
            latents: as the transformer takes them.
            prompts: encoded, by number.
            timesteps: of the scheduler.
        """
        family, side = self.model.family, self.plan.s_max // self.plan.multiple
        grid = (side, side)
        begun = {}
        for number, timestep in enumerate(timesteps):
            for prompt, encoded in prompts.items():
                given = torch.from_numpy(latents)
                inputs = family.inputs(self.skeleton, given, timestep, encoded, grid)
                begun[number, prompt] = family.begin(self.skeleton, inputs)
        states = {key: state for key, (state, _) in begun.items()}
        for number, name in enumerate(self.checkpoint.names):
            with self.checkpoint.block(number) as stored:
                block: nn.Module = stored
                if name in self.trained.order:
                    block = self.trained.get_submodule(name)
                states = {
                    key: family.run_block(name, block, state, begun[key][1], grid)
                    for key, state in states.items()
                }
        return {
            key: family.learned(
                family.head(self.skeleton, state.image, begun[key][1], grid)
            ).numpy()
            for key, state in states.items()
        }

    @torch.no_grad()
    def decoded(self, latents: np.ndarray) -> np.ndarray:
        """Pixels [1, 3, s_max, s_max] of the transformer's latents, in tiles as the device."""
        family = self.model.family
        facts = family.latents(self.vae)

        def run(part: np.ndarray) -> list[np.ndarray]:
            pixels: Tensor = family.pixels(self.vae, torch.from_numpy(part))
            return [pixels.numpy()]

        raw = facts.raw(latents, self.plan.s_max // facts.factor)
        return tiled(raw, run, TILE // facts.factor, 1, (facts.factor, 1))[0]


def _silent(_steps: float = 1) -> None:
    """Shows no progress."""
