"""Pictures -> draws just in time, one for every step, without a bank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_dit.contract.bank import Draw
from edge_dit.contract.bundle import open_bundle
from edge_dit.errors import BadInput
from edge_dit.pictures.dataset import Captioned, check_readable
from edge_dit.pictures.draws import DrawRule, drawn_of, prompts_of
from edge_dit.store.files import StrPath
from edge_dit_runtime.loop.collect import open_parts, read_pictures
from edge_dit_runtime.loop.parts import Parts
from edge_dit_runtime.loop.shipped import NEEDED
from edge_dit_runtime.loop.starts import Starts, planned_of
from edge_dit_runtime.sessions.trainer import Tensors

RING = 8
"""Crops that take turns. Their clean latents are kept in memory: 2 MB of FLUX at 512 pixels."""
USES = 4
"""Noise levels that each crop serves before another takes its place: the autoencoder, which takes
most of the time on a phone, runs in one step of this many."""


class LiveDraws:
    """Draws of pictures, made when a step asks for them. They follow from the plan's seed, so a
    resumed run goes on with the same ones.

    Steps go round a ring of `RING` crops; each crop is encoded once and used `USES` times, every
    time with other noise and, of the levels whose crops have its side, at another one.

    Args:
        parts: of the bundle.
        images: from `edge_dit_runtime.loop.collect.read_pictures`.
        name: of their folder, for messages.

    Attributes:
        identity: SHA-256 of what the draws are made of.
        name: of the folder.
    """

    def __init__(self, parts: Parts, images: Sequence[Captioned], name: str) -> None:
        self.name = name
        prompts = prompts_of(images)
        self._images = images
        self._starts = Starts(parts, images, dict(enumerate(map(parts.prompt, prompts))))
        plan = self._starts.plan
        self._rule = DrawRule(
            plan.seed,
            parts.objective.level,
            drawn_of(images, prompts),
            plan.crop_rule,
        )
        made_of = [parts.bundle.manifest.plan_hash, RING, USES]
        made_of += [_made_of(image) for image in images]
        self.identity = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        self._ring: dict[int, np.ndarray] = {}

    def number(self, step: int, seed: int) -> int:
        """Number of the draw that a step trains on: its own."""
        return step

    def _crop(self, number: int) -> tuple[int, Draw]:
        """Number of a draw's crop, and the draw that the crop is encoded for."""
        turn, place = divmod(number, RING * USES)
        crop = turn * RING + place % RING
        return crop, self._rule.draw(crop)

    def draw(self, number: int) -> Draw:
        """What a draw is made of."""
        first, use = self._crop(number)[1], number % (RING * USES) // RING
        return self._rule.again(first, use) if use else first

    def __getitem__(self, number: int) -> Tensors:
        """The batch tensors of a draw, float32, by the names that exported graphs use."""
        crop, first = self._crop(number)
        if crop not in self._ring:
            turn = crop // RING
            self._ring = {n: clean for n, clean in self._ring.items() if n // RING == turn}
            self._ring[crop] = self._starts.encode(first)
        begun = self._starts.enter(self.draw(number), self._ring[crop])
        return self._starts.tensors([begun])[0]

    def in_words(self, number: int) -> str:
        """A draw for a message: "draw 3 (image dog.png, sigma 0.512)"."""
        draw = self.draw(number)
        return f"draw {number} (image {self._images[draw.image].name}, sigma {draw.sigma:.3f})"


def _made_of(image: Captioned) -> list[Any]:
    """All of a picture that its draws follow from."""
    more = [image.dropout, image.repeats, image.weight, image.mask_sha256]
    plain = [image.name, image.sha256, *image.captions]
    return [*plain, *(more if more != [0.0, 1, 1.0, ""] else [])]


def live(
    bundle: StrPath, images: StrPath, *, prompt: str | None = None, recursive: bool = False
) -> LiveDraws:
    """Draws of a folder of pictures, to train on without a bank.

    Args:
        bundle: exported with the loop's parts.
        images: folder of pictures.
        prompt: caption of pictures without one of their own; default the job's.
        recursive: read sub-folders too.

    Raises:
        BadInput: the bundle lacks the loop's parts or a caption, or is damaged; the plan has a
            prior; pictures cannot be read.

    Example:
        >>> run = er.train("loop_bundle", er.live("loop_bundle", "images"), "live_run", steps=2)
        >>> run.done
        2
    """
    parts = open_parts(open_bundle(Path(bundle)))
    if planned_of(parts.bundle).prior_share:
        raise BadInput(
            parts.bundle.folder,
            found=NEEDED,
            expected="a bank",
            remedy="make one first: edge-dit collect, with --prior",
        )
    pictures = read_pictures(parts, Path(images), prompt, recursive)
    check_readable(pictures)
    return LiveDraws(parts, pictures, Path(images).resolve().name)
