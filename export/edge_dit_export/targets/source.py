"""What every target is exported from. Each graph is traced once, when it is first needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from edge_dit.contract.adamw import AdamW
from edge_dit.contract.targets import ROTATED, WIDE, Compute, Dtype, stored_as
from edge_dit.models.int8_products import computing_in_int8
from edge_dit.models.patch_sampler import PatchSampler
from edge_dit.models.rotation import taken_for_rotated
from edge_dit.models.subgraph import TrainableSubgraph
from edge_dit.pictures.crop import CropRule
from edge_dit_export.graph.optimizer import AdamWStep, trace_optimizer
from edge_dit_export.graph.trace import TracedStep
from edge_dit_export.graph.train_step import trace_train_step
from edge_dit_export.targets.loop_source import LoopSource

MAX_IMAGE_SIDES = 4
"""The patch sampler takes images with sides up to this many times s_max."""


@dataclass(frozen=True)
class Source:
    """A sub-graph, ready to be exported.

    Attributes:
        subgraph: float32, LoRA in place.
        batch: one draw, as `TrainableSubgraph.forward` takes it; only the shapes matter.
        adamw: hyper-parameters of the optimizer.
        crops: the rule of the patch sampler.
        weights: how frozen matrices are stored, where a target offers more than float32.
        recompute: whether to write the recomputing layout too, where a target has one.
        loop: what the loop's parts are made from, if they are wanted and a target has them.
        compute: how products with the blocks' frozen matrices are computed, where a target offers
            more than float32.
    """

    subgraph: TrainableSubgraph
    batch: dict[str, Tensor]
    adamw: AdamW
    crops: CropRule
    weights: Dtype = WIDE
    recompute: bool = False
    loop: LoopSource | None = None
    compute: Compute = WIDE

    @property
    def stored(self) -> str:
        """See `edge_dit.contract.targets.stored_as`."""
        return stored_as(self.weights, self.compute)

    @contextmanager
    def computing(self, rows: bool = False) -> Iterator[None]:
        """Within it, the trained blocks multiply as ``compute`` says, and are traced so.

        Args:
            rows: as `edge_dit.models.int8_products.frozen_product` takes it.
        """
        blocks = self.subgraph.blocks()
        with ExitStack() as stack:
            if self.compute == ROTATED:
                stack.enter_context(taken_for_rotated(blocks))
            if self.compute != WIDE:
                stack.enter_context(computing_in_int8(blocks, rows))
            yield

    @cached_property
    def step(self) -> TracedStep:
        """Loss and gradients as one flat graph; not to be changed."""
        return trace_train_step(self.subgraph, self.batch)

    @cached_property
    def recomputing_step(self) -> TracedStep:
        """The same, but the backward pass computes each block again."""
        return trace_train_step(self.subgraph, self.batch, recompute=True)

    @cached_property
    def optimizer(self) -> TracedStep:
        """AdamW over the LoRA tensors."""
        parameters = self.subgraph.lora_parameters()
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        return trace_optimizer(AdamWStep(self.adamw, shapes))

    @cached_property
    def sampler(self) -> PatchSampler:
        """The patch sampler, a torch module."""
        return PatchSampler(self.crops)

    @property
    def max_image_side(self) -> int:
        """Largest image side, in pixels, for a sampler whose memory is planned in advance."""
        return MAX_IMAGE_SIDES * self.crops.s_max
