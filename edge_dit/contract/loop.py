"""The loop's parts in a bundle: what a device needs to make draws of pictures, and to paint.

They lie in the onnx target's folder. Every graph takes frozen weights as inputs, by name, from the
target's files of frozen weights, so that their pages stay evictable.

    begin.onnx                    latents, timestep, prompt -> state and conditioning of a patch
    base.<kind>.forward.onnx      a block without LoRA, at a patch
    vae_encoder.onnx              a tile of a patch -> mean (and deviation) of its latents
    paint.begin.onnx              as begin.onnx, of a picture
    paint.<kind>.forward.onnx     a block, with or without LoRA, of a picture
    predict.onnx                  state after the last block -> prediction, of a picture
    vae_decoder.onnx              a tile of latents -> pixels
    loop.safetensors              "levels"; "prompt.<number>.<name>" of every prompt
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from edge_dit.contract.graphs import GraphNames, StreamedBlock
from edge_dit.contract.names import PlainName

BEGIN, ENCODER, DECODER, PREDICT = (
    "begin.onnx",
    "vae_encoder.onnx",
    "vae_decoder.onnx",
    "predict.onnx",
)
PAINT = "paint."
"""Prefix of the graphs of a whole picture that have a twin of a patch."""
TILE = 256
"""Most pixels per side of what the autoencoder takes at once, to bound its memory."""
TABLES = "loop.safetensors"
LEVELS = "levels"
LATENTS, TIMESTEP, PROMPT = "latents", "timestep", "prompt."
"""Inputs of `BEGIN`: latents as the transformer takes them; the scheduler's timestep times
`LoopFacts.timestep_factor`, [1]; and prefix of an encoded prompt's tensors, there and in
`TABLES`."""
PIXELS, MEAN, DEVIATION, PREDICTION = "pixels", "mean", "deviation", "prediction"
"""Input of the encoder and output of the decoder [1, 3, H, W] in [-1, 1]; outputs of the encoder
[1, C, h, w]; output of `PREDICT`, shaped as latents."""


def base_file(kind: str) -> str:
    """Forward graph of a kind of blocks without LoRA, at a patch."""
    return f"base.{kind}.forward.onnx"


def paint_file(kind: str) -> str:
    """Forward graph of a kind of blocks, of a picture."""
    return f"{PAINT}{kind}.forward.onnx"


def _channels(numbers: list[float]) -> np.ndarray:
    return np.array(numbers, np.float32).reshape(1, -1, 1, 1)


def _tokens(latents: np.ndarray) -> np.ndarray:
    """Latents [1, C, h, w] with 2 x 2 of them in a token, [1, h w / 4, 4 C]."""
    _, channels, height, width = latents.shape
    split = latents.reshape(1, channels, height // 2, 2, width // 2, 2)
    return split.transpose(0, 2, 4, 1, 3, 5).reshape(1, height * width // 4, channels * 4)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LoopGraph(GraphNames):
    """A graph of the loop that is not a block's.

    Attributes:
        weights: input -> key in the files of frozen weights.
    """

    weights: dict[str, str]


class Latents(_Part):
    """How the autoencoder's latents and the transformer's differ.

    The transformer's are ``(raw - shift) * scale``, each channel by its own numbers; if ``packed``,
    2 x 2 of them are a token: [1, C, h, w] -> [1, h w / 4, 4 C].

    Attributes:
        shift, scale: of each channel.
        packed: whether they are tokens.
        of_tokens: whether shift and scale are of the 4 C channels of tokens.
        factor: pixels per side of a latent.
        samples: whether the encoder's output is sampled, with its deviation.
    """

    shift: list[float]
    scale: list[float]
    packed: bool
    of_tokens: bool = False
    factor: Annotated[int, Field(ge=1, le=1024)]
    samples: bool

    def scaled(self, raw: np.ndarray) -> np.ndarray:
        """The transformer's latents, float32, of the autoencoder's [1, C, h, w]."""
        if self.of_tokens:
            return (_tokens(raw) - np.array(self.shift, np.float32)) * np.array(
                self.scale, np.float32
            )
        latents = (raw - _channels(self.shift)) * _channels(self.scale)
        return _tokens(latents) if self.packed else latents

    def raw(self, latents: np.ndarray, side: int) -> np.ndarray:
        """The autoencoder's latents [1, C, side, side], float32, of the transformer's."""
        if self.of_tokens:
            latents = latents / np.array(self.scale, np.float32) + np.array(self.shift, np.float32)
        if self.packed:
            split = latents.reshape(1, side // 2, side // 2, -1, 2, 2)
            latents = split.transpose(0, 3, 1, 4, 2, 5).reshape(1, -1, side, side)
        if self.of_tokens:
            return latents
        return latents / _channels(self.scale) + _channels(self.shift)

    @property
    def channels(self) -> int:
        """Of the autoencoder's latents."""
        return len(self.scale) // (4 if self.of_tokens else 1)

    def shape(self, side: int) -> tuple[int, ...]:
        """Shape of the transformer's latents of a square of ``side`` latents."""
        channels = self.channels
        return (1, side * side // 4, channels * 4) if self.packed else (1, channels, side, side)


class Levels(_Part):
    """What the model predicts; its table is `LEVELS`, float64, in `TABLES`.

    Attributes:
        kind: "velocity": the table has the noise levels of `edge_dit.contract.objective.
            FlowMatching`; "noise": the cumulated alphas of `EpsilonPrediction`.
        logit_normal, precondition: of `FlowMatching`.
    """

    kind: Literal["velocity", "noise"]
    logit_normal: bool = False
    precondition: bool = False


class PaintStep(_Part):
    """A step of the scheduler. Its result is linear in all latents and predictions before.

    Attributes:
        timestep: of the scheduler, before `LoopFacts.timestep_factor`.
        latents: number of the step -> factor of the latents that entered it.
        predictions: number of the step -> factor of its guided prediction.
    """

    timestep: float
    latents: dict[int, float]
    predictions: dict[int, float]


class Painting(_Part):
    """How a picture is painted.

    Attributes:
        side: of the picture, in pixels.
        steps: of the scheduler.
        guidance: "none": the prediction of the prompt; "classifier-free": u + s (p - u) of the
            prediction p of the prompt and u of the negative one; "rescaled": that, with the norm of
            p over the last axis.
        scale: s.
    """

    side: Annotated[int, Field(ge=1)]
    steps: Annotated[list[PaintStep], Field(min_length=1)]
    guidance: Literal["none", "classifier-free", "rescaled"]
    scale: float


class DrawFacts(_Part):
    """How the job makes draws of a device's pictures; as its keys of [data] and [prior].

    Attributes:
        trigger, caption_lines, caption_dropout, folder_repeats, alpha_masks: see
            `edge_dit.pictures.dataset.SubjectFolder`.
    """

    trigger: str | None = None
    caption_lines: bool = False
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    folder_repeats: bool = False
    alpha_masks: bool = False


class LoopFacts(BaseModel):
    """The loop's entry in the manifest.

    Attributes:
        graphs: of parts, by file.
        block_graphs: of blocks, by file.
        blocks: every block of the model in order, without LoRA: kind of `base_file`.
        paint_blocks: the same for `paint_file`; the trained ones with LoRA.
        per_prompt: conditioning that depends on the prompt alone.
        placed: conditioning with a row for each token, which windows cut with the states.
        latents: of the autoencoder.
        levels: of the objective.
        timestep_factor: of the scheduler's timestep; the product is `TIMESTEP`.
        tile: side in pixels of the squares that encoder and decoder take.
        prompts: texts whose tensors are in `TABLES`, by number.
        caption: of pictures that have none of their own; the job's [data] prompt.
        draws: what becomes of pictures' captions; not written where nothing does.
        previews: numbers of the prompts that are painted while training.
        negative: number of the default negative prompt, if guidance needs one.
        negatives: numbers of the prompts that are encoded as negative ones.
        painting: None if the model's scheduler cannot be written down.
        no_painting: why not.
    """

    graphs: dict[PlainName, LoopGraph]
    block_graphs: dict[PlainName, GraphNames]
    blocks: list[StreamedBlock]
    paint_blocks: list[StreamedBlock]
    per_prompt: list[str]
    placed: list[str] = []
    latents: Latents
    levels: Levels
    timestep_factor: float
    tile: Annotated[int, Field(ge=1)]
    prompts: list[str]
    caption: str | None = None
    draws: DrawFacts = DrawFacts()
    previews: list[int] = []
    negatives: list[int] = []
    negative: int | None = None
    painting: Painting | None = None
    no_painting: str = ""

    @model_validator(mode="after")
    def _whole(self) -> LoopFacts:
        graphs = [BEGIN, ENCODER, *([PAINT + BEGIN, PREDICT, DECODER] if self.painting else [])]
        blocks = [base_file(block.kind) for block in self.blocks]
        blocks += [paint_file(block.kind) for block in self.paint_blocks]
        missing = [name for name in graphs if name not in self.graphs]
        missing += [name for name in blocks if name not in self.block_graphs]
        if missing:
            raise ValueError(f"no graph {missing[0]!r:.80}")
        if any(
            not 0 <= n < len(self.prompts)
            for n in (*self.negatives, *self.previews, self.negative or 0)
        ):
            raise ValueError("a prompt that is not in the list")
        return self
