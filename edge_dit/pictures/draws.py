"""Which draws a bank holds. One seed decides everything about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from edge_dit.contract import bank
from edge_dit.contract.bank import Draw
from edge_dit.contract.noise import CAPTION, CROP, seed_of, uniform
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
        prior_share: share of the draws that are prior draws.
    """

    plan_hash: str
    draws: int
    seed: int
    rule: CropRule
    dtype: bank.Dtype
    bytes_each: int
    prior_share: float = 0.0


def bank_index(
    asked: BankRequest, images: Sequence[Captioned], level: Callable[[float], float]
) -> bank.Index:
    """The index of a bank: all its draws, by request and pictures alone.

    Args:
        asked: of the bank.
        images: from `edge_dit.pictures.dataset.read_folder`.
        level: see `DrawRule`.
    """
    prompts = prompts_of(images)
    drawn = drawn_of(images, prompts)
    rule = DrawRule(asked.seed, level, drawn, asked.rule, asked.prior_share)
    listed = [image.listed(of.choice) for image, of in zip(images, drawn, strict=True)]
    shard = max(1, min(bank.SHARD, SHARD_BYTES // asked.bytes_each))
    draws = rule.draws(asked.draws)
    return bank.Index(asked.plan_hash, listed, prompts, draws, shard, asked.dtype)


def prompts_of(images: Sequence[Captioned]) -> list[str]:
    """Distinct prompts of pictures in their order; the empty one last, where it was not there."""
    texts = [text for image in images for text in image.captions]
    return list(dict.fromkeys([*texts, *("" for image in images if image.dropout)]))


def drawn_of(images: Sequence[Captioned], prompts: Sequence[str]) -> list[Drawn]:
    """Pictures as `DrawRule` takes them.

    Args:
        images: from `edge_dit.pictures.dataset.read_folder`.
        prompts: from `prompts_of`.
    """
    number = {text: n for n, text in enumerate(prompts)}
    return [
        Drawn(
            image.size,
            tuple(number[text] for text in (*image.captions, *[""] * bool(image.dropout))),
            image.dropout,
            image.repeats,
            image.prior,
        )
        for image in images
    ]


@dataclass(frozen=True)
class Drawn:
    """A picture as draws see it.

    Attributes:
        size: height and width in pixels.
        prompts: numbers of its captions; where it has dropout, then that of the empty prompt.
        dropout: share of its draws that have the empty prompt.
        repeats: turns it has while a picture without repeats has one.
        prior: whether it is one of the prior draws' pictures.
    """

    size: tuple[int, int]
    prompts: tuple[int, ...]
    dropout: float = 0.0
    repeats: int = 1
    prior: bool = False

    @property
    def choice(self) -> tuple[int, ...]:
        """`prompts`, if there is a choice; else none."""
        return self.prompts if len(self.prompts) > 1 else ()

    def prompt(self, seed: int) -> int:
        """Number of the prompt of a draw with ``seed``."""
        if len(self.prompts) == 1:
            return self.prompts[0]
        drop, which = map(float, uniform(seed, CAPTION, 2))
        captions = self.prompts[:-1] if self.dropout else self.prompts
        return self.prompts[-1] if drop < self.dropout else captions[int(which * len(captions))]


@dataclass(frozen=True)
class DrawRule:
    """How draws follow from a seed and pictures.

    Attributes:
        seed: of the bank.
        level: share in [0, 1) of the training density -> noise level
            (`edge_dit.contract.objective.FlowMatching.level`).
        pictures: in the order in which they take turns.
        crops: the rule of the crops.
        prior_share: share of the draws that are of the prior's pictures.
    """

    seed: int
    level: Callable[[float], float]
    pictures: Sequence[Drawn]
    crops: CropRule
    prior_share: float = 0.0

    @cached_property
    def _turns(self) -> tuple[list[int], list[int]]:
        """Numbers of pictures in turn, each as often as it is repeated: the subject's, the
        prior's.
        """
        most = max(picture.repeats for picture in self.pictures)
        rounds = [
            n for turn in range(most) for n, p in enumerate(self.pictures) if turn < p.repeats
        ]
        prior = [n for n in rounds if self.pictures[n].prior]
        return [n for n in rounds if not self.pictures[n].prior], prior

    def draw(self, number: int) -> Draw:
        """Draw ``number``.

        Images take turns. The golden-ratio sequence spreads noise levels evenly over the training
        density. Crop position and noise are pseudo-random, by `edge_dit.contract.noise`. Prior
        draws are spread evenly among the others, and are a sequence of their own.
        """
        before, prior = int(number * self.prior_share), self._is_prior(number)
        turns, count = self._turns[prior], before if prior else number - before
        # The draws of each single image must cover the noise levels too.
        turn, place = divmod(count, len(turns))
        offset = float(uniform(self.seed, CROP, 1)[0])
        sigma = self.level((offset + turn * GOLDEN + place / len(turns)) % 1.0)
        seed = seed_of(self.seed, number)
        u, v = map(float, uniform(seed, CROP, 2))
        image = self.pictures[turns[place]]
        crop = self.crops.crop(sigma, u, v, *image.size)
        return Draw(seed, turns[place], image.prompt(seed), sigma, u, v, crop)

    def _is_prior(self, number: int) -> bool:
        return int((number + 1) * self.prior_share) > int(number * self.prior_share)

    def draws(self, count: int) -> list[Draw]:
        """The first draws. Where all pictures are the prior's, those of them that are prior draws:
        they are the same beside any subject.
        """
        own, _ = self._turns
        return [self.draw(number) for number in range(count) if own or self._is_prior(number)]

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
