"""Which draws a bank holds. One seed decides everything about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_dit.contract import bank
from edge_dit.contract.bank import Draw
from edge_dit.contract.noise import CROP, seed_of, uniform
from edge_dit.pictures.crop import CropRule
from edge_dit.pictures.dataset import Captioned

GOLDEN = (5**0.5 - 1) / 2
"""Step of the additive recurrence that spreads noise levels. Any prefix of it covers (0, 1) evenly
(H. Weyl; Roberts, "The unreasonable effectiveness of quasirandom sequences").
"""


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
        level: see `plan_draws`.
    """
    prompts = list(dict.fromkeys(image.caption for image in images))
    draws = plan_draws(
        asked.draws,
        asked.seed,
        level,
        [prompts.index(image.caption) for image in images],
        [image.size for image in images],
        asked.rule,
    )
    named = [{"name": image.name, "sha256": image.sha256} for image in images]
    shard = max(1, min(bank.SHARD, SHARD_BYTES // asked.bytes_each))
    return bank.Index(asked.plan_hash, named, prompts, draws, shard, asked.dtype)


def plan_draws(
    count: int,
    seed: int,
    level: Callable[[float], float],
    prompt_of_image: list[int],
    sizes: list[tuple[int, int]],
    rule: CropRule,
) -> list[Draw]:
    """All draws of a bank.

    Images take turns. The golden-ratio sequence spreads noise levels evenly over the training
    density. Crop position and noise are pseudo-random, by `edge_dit.contract.noise`.

    Args:
        count: number of draws.
        seed: of the bank.
        level: share in [0, 1) of the training density -> noise level
            (`edge_dit.contract.objective.FlowMatching.level`).
        prompt_of_image: number of each image's prompt.
        sizes: height and width of each image in pixels.
        rule: of the crops.
    """
    offset = float(uniform(seed, CROP, 1)[0])
    draws = []
    for number in range(count):
        draw_seed = seed_of(seed, number)
        u, v = map(float, uniform(draw_seed, CROP, 2))
        # The draws of each single image must cover the noise levels too.
        turn, image = divmod(number, len(sizes))
        sigma = level((offset + turn * GOLDEN + image / len(sizes)) % 1.0)
        crop = rule.crop(sigma, u, v, *sizes[image])
        draws.append(Draw(draw_seed, image, prompt_of_image[image], sigma, u, v, crop))
    return draws
