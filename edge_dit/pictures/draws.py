"""Which draws a bank holds. One seed decides everything about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from edge_dit.contract import bank
from edge_dit.contract.bank import Draw
from edge_dit.contract.noise import CROP, seed_of, uniform
from edge_dit.pictures.crop import CropRule
from edge_dit.pictures.dataset import Captioned

GOLDEN = (5**0.5 - 1) / 2
"""Step of the additive recurrence that spreads noise levels. Any prefix of it covers (0, 1) evenly
(H. Weyl; Roberts, "The unreasonable effectiveness of quasirandom sequences").
"""


TRIES = 4096
"""Noise levels that are tried until one has a crop of the wanted side, of a few dozen."""
SHARD_BYTES = 128 * 2**20
"""About how many bytes of draws are in memory at once. The draws of a shard go through the model
together, block by block, so each block is read once per shard.
"""


@dataclass(frozen=True)
class BankRequest:
    """What decides a bank, beside its pictures.

    Attributes:
        plan_hash: `edge_dit.planning.plan.Plan.identity`.
        draws: number of draws.
        seed: of the plan.
        rule: of the crops.
        dtype: of large tensors, see `edge_dit.contract.bank.Index`.
        bytes_each: of a draw's float32 tensors, those of its prompt too.
    """

    plan_hash: str
    draws: int
    seed: int
    rule: CropRule
    dtype: bank.Dtype
    bytes_each: int


def bank_index(
    asked: BankRequest, images: Sequence[Captioned], level: Callable[[float], float]
) -> bank.Index:
    """The index of a bank: all its draws, by request and pictures alone.

    Args:
        asked: of the bank.
        images: from `edge_dit.pictures.dataset.read_folder`.
        level: see `DrawRule`.
    """
    prompts = list(dict.fromkeys(image.caption for image in images))
    prompt_of_image = [prompts.index(image.caption) for image in images]
    sizes = [image.size for image in images]
    draws = DrawRule(asked.seed, level, prompt_of_image, sizes, asked.rule).draws(asked.draws)
    named = [{"name": image.name, "sha256": image.sha256} for image in images]
    shard = max(1, min(bank.SHARD, SHARD_BYTES // asked.bytes_each))
    return bank.Index(asked.plan_hash, named, prompts, draws, shard, asked.dtype)


@dataclass(frozen=True)
class DrawRule:
    """How draws follow from a seed and pictures.

    Attributes:
        seed: of the bank.
        level: share in [0, 1) of the training density -> noise level
            (`edge_dit.contract.objective.FlowMatching.level`).
        prompt_of_image: number of each image's prompt.
        sizes: height and width of each image in pixels.
        crops: the rule of the crops.
    """

    seed: int
    level: Callable[[float], float]
    prompt_of_image: Sequence[int]
    sizes: Sequence[tuple[int, int]]
    crops: CropRule

    def draw(self, number: int) -> Draw:
        """Draw ``number``.

        Images take turns. The golden-ratio sequence spreads noise levels evenly over the training
        density. Crop position and noise are pseudo-random, by `edge_dit.contract.noise`.
        """
        # The draws of each single image must cover the noise levels too.
        turn, image = divmod(number, len(self.sizes))
        offset = float(uniform(self.seed, CROP, 1)[0])
        sigma = self.level((offset + turn * GOLDEN + image / len(self.sizes)) % 1.0)
        seed = seed_of(self.seed, number)
        u, v = map(float, uniform(seed, CROP, 2))
        crop = self.crops.crop(sigma, u, v, *self.sizes[image])
        return Draw(seed, image, self.prompt_of_image[image], sigma, u, v, crop)

    def draws(self, count: int) -> list[Draw]:
        """The first draws."""
        return [self.draw(number) for number in range(count)]

    def again(self, draw: Draw, use: int) -> Draw:
        """The same crop, and so the same clean latents, at another noise level with other noise.

        The level is drawn from the training density among those whose crops have the same side
        (Eq. 1), so that the crop still is the one of its level.

        Args:
            draw: from `draw`.
            use: from 1.
        """
        seed = seed_of(draw.seed, use)
        for share in uniform(seed, CROP, TRIES):
            sigma = self.level(float(share))
            if self.crops.side(sigma) == draw.crop.side:
                return replace(draw, seed=seed, sigma=sigma)
        return replace(draw, seed=seed)
