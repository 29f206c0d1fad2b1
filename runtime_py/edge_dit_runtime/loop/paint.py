"""Prompt and adapter -> picture, by the scheduler's own steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from edge_dit.contract.bundle import ADAPTER, open_bundle
from edge_dit.contract.loop import Painting, PaintStep
from edge_dit.contract.noise import NOISE, normal
from edge_dit.errors import BadInput
from edge_dit.pictures.images import check_name, write_picture
from edge_dit.pictures.sheet import contact_sheet
from edge_dit.progress import bar
from edge_dit.store.files import StrPath
from edge_dit_runtime.loop.collect import open_parts
from edge_dit_runtime.loop.parts import Parts
from edge_dit_runtime.run_folder import RunFolder
from edge_dit_runtime.sessions.state import take
from edge_dit_runtime.sessions.trainer import Tensors


def paint(
    bundle: StrPath,
    prompts: str | Sequence[str],
    file: StrPath,
    *,
    run: StrPath | None = None,
    seeds: int | Sequence[int] = 0,
    negative: str | None = None,
    title: str = "",
) -> Path:
    """Paint a picture; or, of several prompts or seeds, a sheet with a row for each prompt and a
    column for each seed.

    Args:
        bundle: exported with the loop's parts.
        prompts: some that were encoded at export.
        file: the picture to write, .png or .jpg.
        run: run folder whose adapter is used, as last saved; default none.
        seeds: of the noise that is painted from, see docs/noise.md.
        negative: another negative prompt that was encoded at export.
        title: of the sheet.

    Returns:
        The file.

    Raises:
        BadInput: the bundle lacks the loop's parts or a prompt, cannot paint, or is damaged; the
            run is of another bundle; the file cannot be written.

    Example:
        >>> er.paint("loop_bundle", "a sks toy", "toy.png").name
        'toy.png'
    """
    out = Path(file)
    check_name(out)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    numbers = [seeds] if isinstance(seeds, int) else list(seeds)
    if not texts or not numbers:
        raise BadInput("paint", found="no prompt or no seed", expected="at least one of each")
    parts = open_parts(open_bundle(Path(bundle)))
    painter, known = Painter(parts), {text: parts.prompt(text) for text in texts}
    against = None if negative is None else parts.prompt(negative, negative=True)
    adapter = painter.adapter_of(None if run is None else Path(run))
    rows: dict[str, list[np.ndarray]] = {text: [] for text in texts}
    total = len(known) * len(numbers) * len(painter.painting.steps)
    with bar(f"paint {title}".rstrip(), total) as advance:
        for text, seed in product(known, numbers):
            asked = Request(known[text], seed, against)
            rows[text].append(painter.picture(asked, adapter, advance))
    single = len(known) == len(numbers) == 1
    write_picture(out, rows[texts[0]][0] if single else contact_sheet(title, rows))
    return out


@dataclass(frozen=True)
class Request:
    """What is painted.

    Attributes:
        prompt: number of the prompt in the bundle.
        seed: of the noise.
        negative: number of the negative prompt; None for the bundle's default.
    """

    prompt: int
    seed: int
    negative: int | None = None


class Painter:
    """Paints pictures with a bundle's graphs.

    Args:
        parts: of the bundle.

    Attributes:
        painting: how pictures are painted.

    Raises:
        BadInput: the bundle cannot paint; it says why.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts, self.facts = parts, parts.facts
        if self.facts.painting is None:
            raise BadInput(
                parts.bundle.folder,
                found=f"it cannot paint: {self.facts.no_painting}",
                expected="a model whose scheduler's steps can be written down",
                remedy="paint with diffusers: edge-dit adapter RUN -o lora/",
            )
        self.painting: Painting = self.facts.painting

    def adapter_of(self, run: Path | None) -> Tensors:
        """The adapter of a run; of none the bundle's untrained one, whose B is zero.

        Raises:
            BadInput: not a run, or of another bundle.
        """
        bundle = self.parts.bundle
        if run is None:
            adapter = bundle.adapter()
            zeros = {n: np.zeros_like(v) for n, v in adapter.items() if ".lora_B." in n}
            return take({**adapter, **zeros}, bundle.manifest.shapes("lora"))
        tensors, of = RunFolder(run).adapter()
        if of.manifest_sha256 != bundle.manifest_sha256:
            raise BadInput(
                run,
                found=f"a run of another bundle ({of.bundle})",
                expected=f"a run of {bundle.folder}",
                remedy=f"name the bundle that it trained; {ADAPTER} fits no other",
            )
        return take(tensors, bundle.manifest.shapes("lora"))

    def picture(
        self,
        asked: Request,
        adapter: Mapping[str, np.ndarray],
        advance: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """A picture [H, W, 3] uint8.

        Args:
            asked: what is painted.
            adapter: LoRA tensors by their names in diffusers.
            advance: called after every step.
        """
        latents = self.latents(asked, adapter, advance)
        pixels = self.parts.decode(latents, self.painting.side)[0].transpose(1, 2, 0)
        shares = np.clip(pixels / np.float32(2) + np.float32(0.5), 0, 1)
        return np.round(shares * np.float32(255)).astype(np.uint8)

    def latents(
        self,
        asked: Request,
        adapter: Mapping[str, np.ndarray],
        advance: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """The clean latents of a picture, shaped as the transformer takes them."""
        side = self.painting.side // self.facts.latents.factor
        shape = self.facts.latents.shape(side)
        latents = {0: normal(asked.seed, NOISE, shape)}
        predictions: Tensors | dict[int, np.ndarray] = {}
        steps = self.painting.steps
        for number, step in enumerate(steps):
            guided = self._guided(latents[number], step, asked, dict(adapter))
            predictions[number] = guided
            latents[number + 1] = _combined(step, latents, predictions)
            _forget(latents, {n for later in steps[number + 1 :] for n in later.latents}, number)
            _forget(predictions, {n for s in steps[number + 1 :] for n in s.predictions}, number)
            advance()
        return latents[len(steps)]

    def _guided(
        self, latents: np.ndarray, step: PaintStep, asked: Request, adapter: Tensors
    ) -> np.ndarray:
        prompts = [asked.prompt]
        if self.painting.guidance != "none":
            negative = self.facts.negative if asked.negative is None else asked.negative
            assert negative is not None
            prompts.append(negative)
        wanted, *rest = self.parts.predictions(latents, step.timestep, prompts, adapter)
        if not rest:
            return wanted
        guided = rest[0] + np.float32(self.painting.scale) * (wanted - rest[0])
        if self.painting.guidance == "rescaled":
            norm, now = (np.linalg.norm(v, axis=-1, keepdims=True) for v in (wanted, guided))
            guided = guided * (norm / now)
        return guided


def _combined(
    step: PaintStep, latents: Mapping[int, np.ndarray], predictions: Mapping[int, np.ndarray]
) -> np.ndarray:
    """The latents after a step: those before and predictions, each times its factor."""
    terms = [np.float32(factor) * latents[number] for number, factor in step.latents.items()]
    terms += [
        np.float32(factor) * predictions[number] for number, factor in step.predictions.items()
    ]
    return np.asarray(sum(terms[1:], start=terms[0]), np.float32)


def _forget(kept: dict[int, np.ndarray], needed: set[int], done: int) -> None:
    """Drop what no later step reads."""
    for number in [n for n in kept if n <= done and n not in needed]:
        del kept[number]
