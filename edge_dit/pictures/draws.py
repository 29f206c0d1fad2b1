"""Which draws a bank holds. One seed decides everything about them."""

from __future__ import annotations

from collections.abc import Callable

from edge_dit.contract.bank import Draw
from edge_dit.contract.noise import CROP, seed_of, uniform
from edge_dit.pictures.crop import CropRule

GOLDEN = (5**0.5 - 1) / 2
"""Step of the additive recurrence that spreads noise levels. Any prefix of it covers (0, 1) evenly
(H. Weyl; Roberts, "The unreasonable effectiveness of quasirandom sequences").
"""


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
