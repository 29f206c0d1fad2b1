"""What the loop's parts are exported from: the whole model, its autoencoder and encoded prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from edge_dit.contract.loop import Levels, Painting
from edge_dit.contract.objective import FlowMatching, Objective
from edge_dit.models.checkpoint import Checkpoint
from edge_dit.models.families.family import Family, Grid, Prompt
from edge_dit.models.model import Model
from edge_dit.models.subgraph import TrainableSubgraph
from edge_dit.planning.plan import Plan
from edge_dit.planning.prompts import LoopPrompts
from edge_dit.reference.precompute import encoders_of
from edge_dit.reference.recording import record


@dataclass(frozen=True)
class LoopSource:
    """The whole model.

    Attributes:
        model: opened.
        checkpoint: its transformer's weights, read block by block.
        skeleton: its transformer, blocks on the meta device.
        vae: its autoencoder.
        text_tokens: length of an encoded prompt.
        patch, side: pixels per side of what passes the frozen blocks when a bank is made, and of a
            picture.
        per_prompt: conditioning that a bank stores once per prompt.
        placed: conditioning that windows cut with the states.
        prompts: that were asked for.
        texts: all prompts.
        negatives: numbers of those that are encoded as negative ones.
        negative: number of the default negative prompt, if guidance needs one.
        encoded: every prompt.
        painting: how a picture is painted; None if that cannot be written down.
        no_painting: why not.
    """

    model: Model
    checkpoint: Checkpoint
    skeleton: Any
    vae: Any
    text_tokens: int
    patch: int
    side: int
    per_prompt: Sequence[str]
    placed: Sequence[str]
    prompts: LoopPrompts
    texts: list[str]
    negatives: list[int]
    negative: int | None
    encoded: list[Prompt]
    painting: Painting | None
    no_painting: str

    @property
    def family(self) -> Family:
        """Of the model."""
        return self.model.family

    @property
    def objective(self) -> Objective:
        """Of the model."""
        return self.model.objective

    @property
    def levels(self) -> Levels:
        """What the manifest says of the objective."""
        objective = self.objective
        if isinstance(objective, FlowMatching):
            return Levels(
                kind="velocity",
                logit_normal=objective.logit_normal,
                precondition=objective.precondition,
            )
        return Levels(kind="noise")

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return self.model.layers

    @property
    def grid(self) -> Grid:
        """Token rows and columns of what passes the frozen blocks."""
        return self._grid(self.patch)

    @property
    def picture(self) -> Grid:
        """Token rows and columns of a picture."""
        return self._grid(self.side)

    def _grid(self, side: int) -> Grid:
        return side // self.model.multiple, side // self.model.multiple

    def blank(self, grid: Grid) -> tuple[Tensor, Prompt]:
        """Latents and a prompt of the right shapes; their values mean nothing."""
        return self.family.blank(self.skeleton, grid, self.text_tokens)

    def with_lora(self, subgraph: TrainableSubgraph) -> TrainableSubgraph:
        """All blocks, at the size of a picture.

        Args:
            subgraph: its trained blocks, with their LoRA, take the place of the model's own. The
                others are on the meta device.
        """
        model = self.checkpoint.skeleton()
        for name in subgraph.order:
            model.set_submodule(name, subgraph.get_submodule(name))
        return TrainableSubgraph(model, self.family, range(self.layers), self.picture)


def loop_source(plan: Plan, model: Model, prompts: LoopPrompts) -> LoopSource:
    """Load the model's pipeline, encode prompts and record the scheduler's steps.

    Args:
        plan: what to train.
        model: of the plan.
        prompts: to be encoded.

    Raises:
        BadInput: the pipeline cannot be loaded, or a prompt is longer than the plan's.
    """
    checkpoint = model.checkpoint()
    skeleton = checkpoint.skeleton()
    pipeline = encoders_of(model, skeleton)
    family, texts = model.family, list(prompts.texts)
    encoded = family.encode_prompts(pipeline, texts, plan.text_tokens)
    text = family.negative_prompt if prompts.negative is None else prompts.negative
    negative = []
    if family.guides(pipeline) and not family.cannot_paint(pipeline):
        negative = family.encode_negatives(pipeline, [text], plan.text_tokens)
    side = plan.s_max // model.multiple
    latents, _ = family.blank(skeleton, (side, side), plan.text_tokens)
    painting = record(family, pipeline, plan.s_max, latents, [encoded[0], *negative])
    return LoopSource(
        model=model,
        checkpoint=checkpoint,
        skeleton=skeleton,
        vae=pipeline.vae.eval().requires_grad_(False),
        text_tokens=plan.text_tokens,
        patch=plan.passing,
        side=plan.s_max,
        per_prompt=plan.per_prompt(family),
        placed=plan.placed(family),
        prompts=prompts,
        texts=texts + [text] * len(negative),
        negatives=[len(texts)] * len(negative),
        negative=len(texts) if negative else None,
        encoded=[*encoded, *negative],
        painting=None if isinstance(painting, str) else painting,
        no_painting=painting if isinstance(painting, str) else "",
    )
