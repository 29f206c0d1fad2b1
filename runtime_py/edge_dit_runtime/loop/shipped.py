"""A prior's bank: prior draws that the host made of the base model's own pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_dit.contract.bank import Bank, Draw, Index
from edge_dit.errors import BadInput
from edge_dit.pictures.dataset import Captioned
from edge_dit_runtime.sessions.trainer import Tensors

NEEDED = "a plan with [prior], whose draws need the whole model on a patch"
"""What a device cannot make by itself."""
REMEDY = "make it on the host: edge-dit precompute JOB --plan plan.json --prior -o prior/"


class ShippedPrior:
    """The prior draws of a plan, in their order.

    Args:
        folder: as ``edge-dit precompute --prior`` writes it.
        plan_hash: of the bundle.

    Raises:
        BadInput: it is no whole bank of this plan's prior draws.
    """

    def __init__(self, folder: Path, plan_hash: str) -> None:
        self.bank = Bank(folder, plan_hash)
        if not all(image.prior for image in self.bank.index.images):
            raise BadInput(
                folder, found="a bank of a subject", expected="one of a prior alone", remedy=REMEDY
            )

    def pictures(self, side: int) -> list[Captioned]:
        """The pictures that its draws are of, without pixels.

        Args:
            side: of each, pixels.
        """
        index = self.bank.index
        prompts = {draw.image: draw.prompt for draw in index.draws}
        return [
            Captioned(
                listed.name,
                listed.sha256,
                # A picture without draws has any prompt.
                (index.prompts[prompts.get(number, 0)],),
                (side, side),
                upscaled=False,
                load=lambda: np.zeros((0, 0, 3), np.uint8),
                weight=listed.weight,
                prior=True,
            )
            for number, listed in enumerate(index.images)
        ]

    def places(self, index: Index) -> dict[int, int]:
        """Number of each prior draw of a bank -> its number here.

        Args:
            index: of the bank, whose last pictures are `pictures`.

        Raises:
            BadInput: the bank's prior draws are others.
        """
        numbers = [n for n, draw in enumerate(index.draws) if index.images[draw.image].prior]
        theirs = [_made_of(index, index.draws[number]) for number in numbers]
        if theirs != [_made_of(self.bank.index, draw) for draw in self.bank.index.draws]:
            raise BadInput(
                self.bank.folder,
                found="other draws than the plan's prior has",
                expected=f"the {len(numbers)} prior draws of the bundle's plan",
                remedy=REMEDY,
            )
        return {number: place for place, number in enumerate(numbers)}

    def __getitem__(self, place: int) -> Tensors:
        """The batch tensors of a draw, by its number here."""
        return self.bank[place]


def _made_of(index: Index, draw: Draw) -> Sequence[object]:
    """A draw, whatever the numbers of its picture and prompt are."""
    picture, prompt = index.images[draw.image].sha256, index.prompts[draw.prompt]
    return picture, prompt, draw.seed, draw.sigma, draw.u, draw.v, draw.crop
