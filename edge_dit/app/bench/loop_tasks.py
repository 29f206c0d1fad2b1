"""What `edge-dit bench --loop` runs in child processes: the export, then each stage on a device."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edge_dit.app.bench.model import MODEL
from edge_dit.contract.loop import Painting, PaintStep
from edge_dit.store.documents import STRICT

if TYPE_CHECKING:
    from edge_dit.models.model import Model
    from edge_dit.planning.plan import Plan
    from edge_dit_export.targets.loop_source import LoopSource

PAINT_STEPS = 20
"""Of the scheduler: Euler's method, without guidance."""
PROMPT = "a photo"
_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
DC_AE: dict[str, Any] = {
    "encoder_block_types": _BLOCKS,
    "decoder_block_types": _BLOCKS,
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
"""Configuration of the autoencoder that SANA is published with (AutoencoderDC, f32c32); the rest is
diffusers' default."""
STAGES = ("collect", "train", "live", "paint")
Stage = Literal["collect", "train", "live", "paint"]


@dataclass(frozen=True)
class LoopExport:
    """Export a bundle with the loop's parts, of the whole random model.

    Attributes:
        plan: file of the plan.
        work: folder of the bench.
        bundle: where the bundle goes.
    """

    __pydantic_config__ = STRICT
    plan: Path
    work: Path
    bundle: Path
    kind: Literal["loop export"] = "loop export"

    def run(self) -> dict[str, float]:
        """{"seconds": of the export}"""
        from edge_dit.planning.plan import Plan
        from edge_dit_export.export import export

        plan = Plan.model_validate_json(self.plan.read_text())
        plan = plan.model_copy(update={"model": (self.work / MODEL).resolve()})
        started = time.perf_counter()
        export(plan, self.bundle, ["onnx"], check=False, loop=random_source)
        return {"seconds": time.perf_counter() - started}


def random_source(plan: Plan, model: Model) -> LoopSource:
    """The random model's transformer beside a random autoencoder and a random prompt."""
    import torch

    from edge_dit.planning.prompts import LoopPrompts
    from edge_dit_export.targets.loop_source import LoopSource

    checkpoint = model.checkpoint()
    skeleton: Any = checkpoint.skeleton()
    torch.manual_seed(0)
    _, prompt = model.family.blank(skeleton, plan.passing_grid, plan.text_tokens)
    encoded = {
        name: value if name.endswith("mask") else torch.randn(value.shape)
        for name, value in prompt.items()
    }
    return LoopSource(
        model=model,
        checkpoint=checkpoint,
        skeleton=skeleton,
        vae=_random_autoencoder(),
        text_tokens=plan.text_tokens,
        patch=plan.passing,
        side=plan.s_max,
        per_prompt=plan.per_prompt(model.family),
        placed=plan.placed(model.family),
        prompts=LoopPrompts([PROMPT], [0], PROMPT),
        texts=[PROMPT],
        negatives=[],
        negative=None,
        encoded=[encoded],
        painting=_euler(plan.s_max),
        no_painting="",
    )


def _random_autoencoder() -> Any:
    """The autoencoder of published SANA, with random weights."""
    from diffusers import AutoencoderDC

    made: Any = AutoencoderDC(**DC_AE)
    return made.eval().requires_grad_(False)


def _euler(side: int) -> Painting:
    sigmas = np.linspace(1, 0, PAINT_STEPS + 1)
    steps = [
        PaintStep(
            timestep=1000 * float(sigma),
            latents={number: 1.0},
            predictions={number: float(after - sigma)},
        )
        for number, (sigma, after) in enumerate(pairwise(sigmas))
    ]
    return Painting(side=side, steps=steps, guidance="none", scale=1.0)


@dataclass(frozen=True)
class LoopStage:
    """Run one stage as a device does. "train" needs the bank that "collect" made.

    Attributes:
        stage: which.
        work: folder of the bench.
        bundle: made by a `LoopExport`.
        steps: of training.
    """

    __pydantic_config__ = STRICT
    stage: Stage
    work: Path
    bundle: Path
    steps: int
    kind: Literal["loop stage"] = "loop stage"

    def run(self) -> dict[str, float]:
        """{"seconds": of one draw, step or picture}"""
        import edge_dit_runtime as er

        images, bank = self.work / "images", self.bundle.with_name(f"{self.bundle.name}-bank")
        started, counted = time.perf_counter(), 1
        if self.stage == "collect":
            counted = len(er.collect(self.bundle, images, bank).draws)
        elif self.stage == "paint":
            er.paint(self.bundle, PROMPT, self.work / "painted.png")
        else:
            draws = bank if self.stage == "train" else er.live(self.bundle, images)
            seen: list[float] = []
            er.train(
                self.bundle,
                draws,
                self.bundle.with_name(f"{self.bundle.name}-{self.stage}-{time.time_ns()}"),
                target="onnx:streamed",
                steps=self.steps,
                on_step=lambda _done, _loss: seen.append(time.perf_counter()),
            )
            return {"seconds": (seen[-1] - started) / self.steps}
        return {"seconds": (time.perf_counter() - started) / counted}
