"""Previews by the base model's own pipeline, for bundles without the loop's parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from edge_dit.contract.adapter import write_adapter_folder
from edge_dit.contract.adapter_formats import format_of
from edge_dit.models.model import Model
from edge_dit.models.pipeline import load_pipeline
from edge_dit.planning.plan import Plan, model_of
from edge_dit.reference.evaluate import adapted


class PipelinePainter:
    """Paints a plan's model with adapters that are not finished: a
    `edge_dit_runtime.loop.previews.PreviewPainter`.

    Args:
        plan: of the run. Its model is loaded for the first picture, and stays.
        prompts: of the previews.
    """

    def __init__(self, plan: Plan, prompts: Sequence[str]) -> None:
        self.prompts, self.side = list(prompts), plan.s_max
        self._plan = plan

    @cached_property
    def _model(self) -> Model:
        return model_of(self._plan)

    @cached_property
    def _pipeline(self) -> Any:
        return load_pipeline(self._model.folder, variant=self._model.variant)

    def picture(self, row: int, adapter: Mapping[str, np.ndarray]) -> np.ndarray:
        """A picture of a prompt, [side, side, 3] uint8, from noise of seed ``row``.

        Args:
            row: number of the prompt.
            adapter: LoRA tensors by their names in diffusers.

        Raises:
            BadInput: the model is gone, or cannot be loaded.
        """
        plan, family = self._plan, self._model.family
        with TemporaryDirectory() as name:
            folder, form = Path(name) / "lora", format_of(family.name)
            write_adapter_folder(folder, adapter, plan.rank, plan.alpha, plan.model_name, form)
            with adapted(self._pipeline, folder):
                (picture,) = family.sample(self._pipeline, self.prompts[row], self.side, [row])
        return np.asarray(picture)
