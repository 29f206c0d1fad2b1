"""What a bank's index says of its draws, compared with what the plan makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import numpy as np

from edge_dit.contract.bank import INDEX, Draw, Index
from edge_dit.models.model import Model
from edge_dit.pictures.crop import CropRule
from edge_dit.pictures.draws import Drawn, DrawRule
from edge_dit.planning.plan import Plan

LONGEST = 2**20
"""Longest side of a picture that crop positions are explained by, pixels."""
LINES = 5
"""Most lines about draws in the index."""


def false_index(
    plan: Plan, model: Model, index: Index, sizes: Mapping[int, tuple[int, ...]]
) -> list[str]:
    """Lines for people: what the index says of its draws, and what the plan makes.

    Sizes of pictures that are not at hand are recovered from the crops: one size must explain all
    crops of a picture.

    Args:
        plan: of the bank.
        model: of the plan.
        index: of the bank.
        sizes: height and width of pictures at hand, by number.
    """
    count, level = len(index.images), model.objective.level
    if not count:
        return [f"{INDEX}: no images"]
    prior = sum(listed.prior for listed in index.images)
    if bool(prior) != bool(plan.prior_share) or prior == count:
        return [
            f"{INDEX}: {prior} of {count} images are of prior draws, which are "
            f"{plan.prior_share:g} of the draws by the plan"
        ]

    def planned(prompt_of_image: list[int], of_size: Sequence[tuple[int, ...]]) -> list[Draw]:
        pictures = [
            Drawn((size[0], size[1]), of.prompts or (prompt,), of.dropout, of.repeats, of.prior)
            for of, prompt, size in zip(index.images, prompt_of_image, of_size, strict=True)
        ]
        rule = DrawRule(plan.seed, level, pictures, plan.crop_rule, plan.prior_share)
        return rule.draws(len(index.draws))

    bare = planned([0] * count, [(plan.s_max, plan.s_max)] * count)
    of_image: list[list[tuple[Draw, Draw]]] = [[] for _ in range(count)]
    for have, want in zip(index.draws, bare, strict=True):
        of_image[want.image].append((have, want))
    known = [
        sizes[number] if number in sizes else _recovered(plan.crop_rule, pairs)
        for number, pairs in enumerate(of_image)
    ]
    # One draw that is wrong must not decide what is right for the others of its image.
    prompts = [Counter(have.prompt for have, _ in pairs).most_common(1) for pairs in of_image]
    both = list(zip(index.images, prompts, strict=True))
    wanted = planned([most[0][0] if most else 0 for most in prompts], known)
    named = [of.prompts or ((most[0][0],) if most else ()) for of, most in both]
    wrong = list(_of_prompts(index, named))
    wrong += [
        f"image {number}: crops of a picture of {height} x {width} pixels or more, by the plan its "
        f"shorter side has {plan.s_max}"
        for number, (height, width) in enumerate(known)
        if min(height, width) > plan.s_max
    ]
    wrong += [
        f"draw {number}: {key} is {have}, by the plan {want}"
        for number, pair in enumerate(zip(index.draws, wanted, strict=True))
        for key, have, want in _unlike(*pair)
    ]
    more = [f"and {len(wrong) - LINES} more"] if len(wrong) > LINES else []
    return [f"{INDEX}: {line}" for line in [*wrong[:LINES], *more]]


def _of_prompts(index: Index, named: list[tuple[int, ...]]) -> Iterator[str]:
    """What is wrong with the list of prompts.

    Args:
        index: of the bank.
        named: numbers of the prompts of each image; none for one that is not drawn.
    """
    if len(set(index.prompts)) < len(index.prompts):
        yield "a prompt twice"
    pairs = list(zip(index.images, named, strict=True))
    captions = [n for of, numbers in pairs for n in (numbers[:-1] if of.dropout else numbers)]
    order = list(dict.fromkeys([*captions, *(ns[-1] for of, ns in pairs if of.dropout and ns)]))
    if all(named) and order != list(range(len(index.prompts))):
        yield f"images have prompts {order}, by the plan all in ascending order"


def _unlike(have: Draw, want: Draw) -> Iterator[tuple[str, object, object]]:
    """What of a draw is not as planned: name, and both values."""
    for key, value in vars(have).items():
        other = getattr(want, key)
        # Another processor's exponential may be off in the last place.
        same = np.isclose(value, other, rtol=1e-6, atol=0) if key == "sigma" else value == other
        if not same:
            yield key, value, other


def _recovered(rule: CropRule, pairs: Sequence[tuple[Draw, Draw]]) -> tuple[int, int]:
    """The smallest height and width of a picture that explain most of its crops.

    Args:
        rule: of the crops.
        pairs: of each draw of the picture: as stored, and as planned but for the crop.
    """

    def smallest(want: Draw, axis: int, place: int) -> int:
        """The smallest size in which a crop begins at ``place`` or after it."""
        low, high = rule.s_max, LONGEST
        while low < high:
            middle = (low + high) // 2
            crop = rule.crop(want.sigma, want.u, want.v, middle, middle)
            reached = (crop.top, crop.left)[axis] >= place
            low, high = (low, middle) if reached else (middle + 1, high)
        return low

    def size(axis: int) -> int:
        steps: Counter[int] = Counter({rule.s_max: 0})
        for have, want in pairs:
            place = (have.crop.top, have.crop.left)[axis]
            steps[smallest(want, axis, place)] += 1
            steps[smallest(want, axis, place + 1)] -= 1
        explained = accumulate(steps[edge] for edge in sorted(steps))
        return max(zip(explained, (-edge for edge in sorted(steps)), strict=True))[1] * -1

    return size(0), size(1)
