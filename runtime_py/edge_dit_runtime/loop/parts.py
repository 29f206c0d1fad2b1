"""The loop's graphs. Frozen weights are views of mapped files, as in the streamed layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import cast

import numpy as np

from edge_dit.contract.bundle import Bundle
from edge_dit.contract.loop import (
    BEGIN,
    DECODER,
    DEVIATION,
    ENCODER,
    LATENTS,
    LEVELS,
    MEAN,
    PAINT,
    PIXELS,
    PREDICT,
    PREDICTION,
    PROMPT,
    TABLES,
    TIMESTEP,
    LoopFacts,
    base_file,
    paint_file,
)
from edge_dit.contract.names import COND, ENTRY, NEW, STATE
from edge_dit.contract.noise import POSTERIOR, normal
from edge_dit.contract.objective import EpsilonPrediction, FlowMatching, Objective
from edge_dit.contract.targets import OnnxFacts, StreamedBlock
from edge_dit.errors import BadInput
from edge_dit.pictures.captions import clean
from edge_dit.pictures.tiles import tiled
from edge_dit.store.tensors import TensorFile
from edge_dit_runtime.sessions.mapped import MappedTensors
from edge_dit_runtime.sessions.onnx_program import OnnxProgram
from edge_dit_runtime.sessions.ort import onnxruntime, share_arena
from edge_dit_runtime.sessions.trainer import Tensors

TARGET = "onnx"


class Parts:
    """The loop's parts of a bundle, opened.

    Args:
        bundle: opened; its files are checked already.

    Attributes:
        facts: the loop's entry in the manifest.
        objective: what the model predicts, and its noise levels.

    Raises:
        BadInput: the bundle has no such parts, they are damaged, or onnxruntime is missing.
    """

    def __init__(self, bundle: Bundle) -> None:
        facts = cast(OnnxFacts, bundle.facts(TARGET))
        self.facts = _loop_of(bundle, facts)
        self.bundle = bundle
        share_arena(onnxruntime("the loop"), doubling=True)
        self._frozen = MappedTensors(*(bundle.file(TARGET, name) for name in facts.frozen))
        self._programs: dict[str, OnnxProgram] = {}
        # Every step of a painting asks for the same two.
        self._encoded = lru_cache(maxsize=2)(self._read_prompt)
        tables = bundle.file(TARGET, TABLES)
        try:
            self._tables = TensorFile(tables)
            self.objective = _objective(self.facts, self._tables.read([LEVELS])[LEVELS])
        except (OSError, ValueError, KeyError) as error:
            raise BadInput(
                tables, found=f"damaged ({error})", remedy="export the bundle again"
            ) from None

    def tables(self) -> Tensors:
        """Every tensor of `TABLES`."""
        return self._tables.read()

    def prompt(self, text: str, negative: bool = False) -> int:
        """Number of a prompt in the bundle.

        Args:
            text: of the prompt.
            negative: whether it is a negative one, which some models encode in another way.

        Raises:
            BadInput: the bundle lacks it.
        """
        wanted = set(self.facts.negatives) if negative else set(self._positive())
        for number in sorted(wanted):
            if self.facts.prompts[number] == clean(text):
                return number
        kind = "negative prompt" if negative else "prompt"
        known = "; ".join(repr(self.facts.prompts[number])[:60] for number in sorted(wanted)[:5])
        raise BadInput(
            self.bundle.folder,
            found=f"no {kind} {text!r:.80}",
            expected=f"one that was encoded when it was exported: {known}",
            remedy=f"add it to [export] {'negative_prompt' if negative else 'prompts'} "
            "and export again",
        )

    def _positive(self) -> list[int]:
        return [n for n in range(len(self.facts.prompts)) if n not in self.facts.negatives]

    def begin(
        self, latents: np.ndarray, timestep: float, prompt: int, whole: bool = False
    ) -> tuple[Tensors, Tensors]:
        """The state that enters the first block, by `STATE`, and conditioning, by batch names.

        Args:
            latents: noised, as the transformer takes them.
            timestep: of the scheduler.
            prompt: its number.
            whole: of a whole picture, not of a patch.
        """
        scaled = np.array([timestep * self.facts.timestep_factor], np.float32)
        given = {LATENTS: latents, TIMESTEP: scaled, **self._encoded(prompt)}
        made = self._part(PAINT + BEGIN if whole else BEGIN, given)
        state = {name: made[name] for name in STATE if name in made}
        return state, {name: made[name] for name in made if name.startswith(COND)}

    def _read_prompt(self, number: int) -> Tensors:
        """An encoded prompt, by the names of `BEGIN`'s inputs."""
        prefix = f"{PROMPT}{number}."
        keys = [name for name in self._tables.header.tensors if name.startswith(prefix)]
        read = self._tables.read(keys)
        return {PROMPT + key.removeprefix(prefix): value for key, value in read.items()}

    @contextmanager
    def _weights(self, weights: Mapping[str, str]) -> Iterator[Tensors]:
        """Frozen weights by the names of a graph's inputs; their pages are given back after."""
        self._frozen.fetch(weights.values())
        yield {local: self._frozen[key] for local, key in weights.items()}
        self._frozen.release()

    def _part(self, file: str, given: Tensors) -> Tensors:
        with self._weights(self.facts.graphs[file].weights) as weights:
            return self._program(file).named({**given, **weights})

    def _program(self, file: str) -> OnnxProgram:
        if file not in self._programs:
            names = self.facts.graphs.get(file) or self.facts.block_graphs[file]
            path = self.bundle.file(TARGET, file)
            self._programs[file] = OnnxProgram(path, names.inputs, names.outputs)
        return self._programs[file]

    def through_base(
        self, block: StreamedBlock, states: Sequence[Tensors], conds: Sequence[Tensors]
    ) -> list[Tensors]:
        """The states of patches after a block without LoRA; its weights are read once.

        Args:
            block: one of `LoopFacts.blocks`.
            states: before the block, by `STATE`.
            conds: conditioning of each, by batch names.
        """
        return self._through(base_file(block.kind), block, states, conds, {})

    def _through(
        self,
        file: str,
        block: StreamedBlock,
        states: Sequence[Tensors],
        conds: Sequence[Tensors],
        adapter: Mapping[str, np.ndarray],
    ) -> list[Tensors]:
        program = self._program(file)
        lora = {local: adapter[name] for local, name in block.lora.items()}
        with self._weights(block.weights) as weights:
            made = [
                program.named({**state, **cond, **_own(block, cond), **weights, **lora})
                for state, cond in zip(states, conds, strict=True)
            ]
        return [{n.removeprefix(NEW): value for n, value in after.items()} for after in made]

    def predictions(
        self,
        latents: np.ndarray,
        timestep: float,
        prompts: Sequence[int],
        adapter: Mapping[str, np.ndarray],
    ) -> list[np.ndarray]:
        """What the adapted model predicts of a whole picture, for each prompt, shaped as latents.
        Each block's weights are read once for all of them.

        Args:
            latents: noised, as the transformer takes them.
            timestep: of the scheduler.
            prompts: numbers of prompts.
            adapter: LoRA tensors by their names in diffusers.
        """
        begun = [self.begin(latents, timestep, prompt, whole=True) for prompt in prompts]
        states, conds = [state for state, _ in begun], [cond for _, cond in begun]
        for block in self.facts.paint_blocks:
            states = self._through(paint_file(block.kind), block, states, conds, adapter)
        return [self._predict(*pair) for pair in zip(states, conds, strict=True)]

    def _predict(self, state: Tensors, cond: Tensors) -> np.ndarray:
        """The prediction of a picture, shaped as latents, from the state after the last block."""
        return self._part(PREDICT, {ENTRY: state[ENTRY], **cond})[PREDICTION]

    def encode(self, pixels: np.ndarray, seed: int) -> np.ndarray:
        """Clean latents of a patch, as the transformer takes them.

        Args:
            pixels: [1, 3, H, W] float32 in [-1, 1].
            seed: of the sample of the posterior, where the family takes one.
        """
        facts = self.facts.latents
        outputs = (MEAN, DEVIATION)[: 1 + facts.samples]

        def run(tile: np.ndarray) -> list[np.ndarray]:
            made = self._part(ENCODER, {PIXELS: tile})
            return [made[name] for name in outputs]

        mean, *rest = tiled(pixels, run, self.facts.tile, facts.factor, (1, facts.factor))
        raw = mean + rest[0] * normal(seed, POSTERIOR, mean.shape) if rest else mean
        return facts.scaled(raw)

    def decode(self, latents: np.ndarray, side: int) -> np.ndarray:
        """Pixels [1, 3, side, side] float32, about in [-1, 1], of clean latents."""
        facts = self.facts.latents

        def run(tile: np.ndarray) -> list[np.ndarray]:
            return [self._part(DECODER, {LATENTS: tile})[PIXELS]]

        raw = facts.raw(latents, side // facts.factor)
        return tiled(raw, run, self.facts.tile // facts.factor, 1, (facts.factor, 1))[0]


def _own(block: StreamedBlock, cond: Tensors) -> Tensors:
    """Conditioning that a block's graph has by another name, by that name."""
    return {local: cond[name] for local, name in block.cond.items()}


def _loop_of(bundle: Bundle, facts: OnnxFacts) -> LoopFacts:
    if facts.loop is None:
        raise BadInput(
            bundle.folder,
            found="no parts of the loop",
            expected="a bundle that reads pictures and paints by itself",
            remedy="put loop = true under [export] in the job, and export it again",
        )
    return facts.loop


def _objective(facts: LoopFacts, table: np.ndarray) -> Objective:
    """The objective of the tables; noise levels are float32, as on the host."""
    levels = facts.levels
    if levels.kind == "noise":
        return EpsilonPrediction(table)
    return FlowMatching(table.astype(np.float32), levels.logit_normal, levels.precondition)
