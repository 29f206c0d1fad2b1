"""The arms of the ablations, as data: what is cropped, which blocks are skipped, what stands in for
them. Sections and tables are the paper's, see docs/method.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from edge_dit.contract.names import FRESH, STORED, TAILS, THROUGH, Tail
from edge_dit.contract.split import trained_blocks
from edge_dit.planning.split import split_by_ratio

CROPS: dict[str, Callable[[float, float], float]] = {
    "resize": lambda sigma, chance: 1.0,
    "low-to-high": lambda sigma, chance: sigma,
    "high-to-low": lambda sigma, chance: 1.0 - sigma,
    "random": lambda sigma, chance: chance,
}
"""(noise level, chance), both in [0, 1] -> (crop side - s_min) / (s_max - s_min). Eq. 1 is
"low-to-high"; every crop is resized to s_min. A crop named "whole" is the whole image at s_max. One
named "window" is too, on its way through the skipped blocks; the trained ones see s_min of it: a
square of tokens, or with "spread" one token of each cell of as many as the patch has."""


MODELS = {"tiny-sana": "sana", "tiny-flux": "flux"}
"""Models in samples/ that arms are run on -> their family."""
CUT = ("window", "spread")
"""Crops of the states of whole pictures."""


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        title: its row in the tables.
        source: where the paper has it.
        crop: "whole", "window", "spread" or one of `CROPS`.
        skipped: share of the blocks without LoRA.
        where: which blocks those are: "selected" (n*, m*) of the model's own selection, "drawn"
            (n*, m*) of the paper's selector, "proposed" with a run between trained blocks that the
            model's selection measured to be better, "first", "last" or "middle", or "split": the
            planner's fixed split, two thirds of them first ones.
        stand_in: what stands in for the skipped blocks: "residual"; "nothing", so that a state
            passes them as it is; or "blocks" - the blocks themselves, frozen.
        patch: s_min of s_max; the paper's is one half.
        tail: what stands in for skipped last blocks, see `edge_dit.contract.names.TAILS`.
        small: patch at noise levels below one half, as a share of s_max; 0 for ``patch``.
        draws: how many a step has, whose mean loss it lowers. They pass one after the other, so
            that a step needs no more memory; and as many times more are in the bank.
        context: what of trained blocks hears, beside a window's tokens, the base model's tokens
            around it (`context.py`): nothing, its "convolutions", or "all": these and attention.
        margin: tokens from a window's edge, where that is not the picture's, whose loss does not
            count: there blocks miss most of what is around.
        counted: whether attention counts each token of a "spread" patch as often as its cell has
            tokens (FLUX).
        told: whether positions say where in the picture, and how large, the crop is.
        order: of the draws: as they come, or by noise level over the whole run. High noise is
            easier (arXiv 2403.10348).
        start: of LoRA's A: normal numbers, or orthogonal rows of the same length; "srr" and "odlri"
            start A and B as what rounding loses (`four_bits.py`).
        rank: of the LoRA; 0 for the job's.
        by_block: whether blocks differ in rank, the sum being the same, by what the model's
            selection measured of each (`ranks_by_block`).
        nested: whether each step trains the first quarter, the first half or all of the job's
            ranks, so that each is an adapter (ordered dropout, arXiv 2308.14929); ``rank`` is then
            what is measured.
        by_rows: whether updates of B's rows shrink as these grow (arXiv 2410.09692).
        emphasis: the loss is weighted by (1 + emphasis) sigma^emphasis, whose mean over even noise
            levels is 1.
        refresh: steps after which tail residuals are computed anew, by the adapted model; 0 never.
        beta1: of AdamW; at 0 it keeps no first moment.
        family: the only one that it can be run on; empty for all.
        compute: how the blocks' frozen matrices are multiplied while it trains: "float32", "int8"
            as a device does with ``[export] compute = "int8"``, or "int4": rounded to four bits.
            What was learned is measured in float32 in each case.
    """

    title: str
    source: str
    crop: str = "low-to-high"
    skipped: float = 0.0
    where: str = "selected"
    stand_in: str = "residual"
    patch: float = 0.5
    tail: Tail = STORED
    small: float = 0.0
    draws: int = 1
    context: Literal["", "convolutions", "all"] = ""
    cell: int = 1
    margin: int = 0
    counted: bool = False
    told: bool = False
    order: Literal["mixed", "easy first", "hard first"] = "mixed"
    start: Literal["gaussian", "orthogonal", "srr", "odlri"] = "gaussian"
    rank: int = 0
    by_block: bool = False
    nested: bool = False
    by_rows: bool = False
    emphasis: float = 0.0
    refresh: int = 0
    beta1: float = 0.9
    family: str = ""
    compute: str = "float32"

    @property
    def whole(self) -> bool:
        """Whether whole pictures pass the first blocks, at s_max."""
        return self.crop in ("whole", *CUT)

    @property
    def banked(self) -> bool:
        """Whether blocks are left out, so that it trains on stored draws."""
        return self.skipped > 0 and self.stand_in != "blocks"

    def by_seed(self, family: str) -> bool:
        """Whether seeds differ in sizes, or in positions that a family's blocks know, so that they
        cannot be one batch. SANA's blocks know none.
        """
        return self.told or self.small > 0 or (self.crop in CUT and family != "sana")


LARGE = 0.875
"""Patch of the sample jobs; at the paper's one half tiny-sana sees a toy in 8 x 8 tokens."""
INT4 = "int4"
NO_LORA = "base"
"""The arm that is not trained."""
ARMS: dict[str, Arm] = {
    NO_LORA: Arm("base model", "", "whole"),
    "full": Arm("full LoRA, full resolution", "Table 2, LoRA", "whole"),
    "low-to-high": Arm("dynamic patch, low to high", "Eq. 1, Table 11"),
    "resize": Arm("resize only", "Table 11", "resize"),
    **{
        name: arm
        for percent in (30, 40, 50)
        for name, arm in {
            f"skip-{percent}": Arm(f"{percent} %, selected", "Table 2", skipped=percent / 100),
            f"bare-{percent}": Arm(
                f"{percent} %, selected, no residuals",
                "Table 2",
                skipped=percent / 100,
                stand_in="nothing",
            ),
        }.items()
    },
    "first-50": Arm("50 %, first blocks", "Sec. 3.2, Table 4", skipped=0.5, where="first"),
    "last-50": Arm("50 %, last blocks", "Sec. 3.2, Table 4", skipped=0.5, where="last"),
    "skip-30-large": Arm("30 %, selected, larger patch", "", skipped=0.3, patch=LARGE),
    "high-to-low": Arm("dynamic patch, high to low", "Table 11", "high-to-low"),
    "random": Arm("random crop size", "Table 11", "random"),
    "middle-50": Arm("50 %, middle blocks", "Hollowed Net", skipped=0.5, where="middle"),
    **{
        name: arm
        for percent in (30, 40, 50)
        for name, arm in {
            f"drawn-{percent}": Arm(
                f"{percent} %, selected by pictures",
                "Sec. 3.2, Algorithm 1",
                skipped=percent / 100,
                where="drawn",
            ),
            f"drawn-bare-{percent}": Arm(
                f"{percent} %, selected by pictures, no residuals",
                "Sec. 3.2, Table 2",
                skipped=percent / 100,
                where="drawn",
                stand_in="nothing",
            ),
        }.items()
    },
    "partial-50": Arm(
        "partial LoRA, full resolution",
        "SANA, partial LoRA",
        "whole",
        skipped=0.5,
        stand_in="blocks",
    ),
    "low-to-high-large": Arm("low to high, larger patch", "", patch=LARGE),
    **{
        f"ends-{blocks}": Arm(f"{blocks} of 12 blocks, selected", "", skipped=blocks / 12)
        for blocks in (8, 9, 10)
    },
    **{
        f"between-{blocks}": Arm(
            f"{blocks} of 12 blocks, with a run between",
            "Sec. 3.2",
            skipped=blocks / 12,
            where="proposed",
        )
        for blocks in (6, 8, 9, 10)
    },
    **{
        f"{tail}-{percent}": Arm(
            f"{percent} %, first and last, tail {tail}",
            "",
            skipped=percent / 100,
            where="split",
            tail=tail,
        )
        for percent in (50, 40, 30)
        for tail in TAILS
    },
    **{
        f"window-{percent}": Arm(
            f"{percent} %, selected, a window of the states", "", "window", percent / 100
        )
        for percent in (30, 50)
    },
    **{
        f"{name}-50": Arm(f"50 %, selected, {title}", source, **{"skipped": 0.5, **what})
        for name, title, source, what in (
            ("four", "four draws a step", "", {"draws": 4}),
            ("window-four", "four windows a step", "", {"crop": "window", "draws": 4}),
            (
                "window-fresh",
                "a window, tail fresh",
                "",
                {"crop": "window", "tail": FRESH},
            ),
            (
                "window-four-fresh",
                "four windows a step, tail fresh",
                "",
                {"crop": "window", "draws": 4, "tail": FRESH},
            ),
            (
                "context",
                "a window that hears the rest",
                "",
                {"crop": "window", "context": "all"},
            ),
            (
                "context-cells",
                "a window that hears cells of the rest",
                "",
                {"crop": "window", "context": "all", "cell": 2, "family": "flux"},
            ),
            (
                "context-four",
                "four windows a step that hear the rest",
                "",
                {"crop": "window", "context": "all", "draws": 4},
            ),
            (
                "context-four-fresh",
                "four windows a step that hear the rest, tail fresh",
                "",
                {"crop": "window", "context": "all", "draws": 4, "tail": FRESH, "family": "flux"},
            ),
            (
                "best",
                "eight windows a step that hear the rest, tail fresh, int8",
                "",
                {
                    "crop": "window",
                    "context": "all",
                    "cell": 2,
                    "draws": 8,
                    "tail": FRESH,
                    "compute": "int8",
                },
            ),
            (
                "ring",
                "a window whose convolutions hear the rest",
                "",
                {"crop": "window", "context": "convolutions", "family": "sana"},
            ),
            (
                "ring-four",
                "four windows a step whose convolutions hear the rest",
                "",
                {"crop": "window", "context": "convolutions", "draws": 4, "family": "sana"},
            ),
            ("margin", "a window but for its edge", "", {"crop": "window", "margin": 1}),
            (
                "margin-four",
                "four windows a step but for their edges",
                "",
                {"crop": "window", "margin": 1, "draws": 4},
            ),
            (
                "spread",
                "tokens spread over the picture",
                "",
                {"crop": "spread", "family": "flux"},
            ),
            (
                "spread-counted",
                "tokens spread over the picture, each counted four times",
                "",
                {"crop": "spread", "counted": True, "family": "flux"},
            ),
            ("told", "positions told", "", {"told": True, "family": "flux"}),
            ("mixed", "smaller patches at low noise", "", {"small": 0.375}),
            ("refreshed", "residuals anew every 50 steps", "", {"refresh": 50}),
            ("easy-first", "easy draws first", "arXiv 2403.10348", {"order": "easy first"}),
            ("hard-first", "hard draws first", "", {"order": "hard first"}),
            ("by-rows", "updates by row norm", "arXiv 2410.09692", {"by_rows": True}),
            ("orthogonal", "orthogonal start", "", {"start": "orthogonal"}),
            ("by-block", "rank by block", "", {"by_block": True}),
            ("emphasis", "loss weighted by noise level", "", {"emphasis": 1.0}),
        )
    },
    **{
        f"int8-{percent}": Arm(
            f"{percent} %, selected, int8", "", skipped=percent / 100, compute="int8"
        )
        for percent in (30, 50)
    },
    **{
        f"lean-{percent}": Arm(
            f"{percent} %, selected, no first moment",
            "",
            skipped=percent / 100,
            beta1=0.0,
        )
        for percent in (30, 50)
    },
    **{
        f"{name}-50": Arm(
            f"50 %, selected, four bits, {words}", "", skipped=0.5, compute=INT4, start=start
        )
        for name, words, start in (
            ("int4", "plain", "gaussian"),
            ("int4-srr", "SRR start", "srr"),
            ("int4-odlri", "ODLRI start", "odlri"),
        )
    },
    **{
        f"{name}{rank}-50": Arm(
            f"50 %, selected, rank {rank}{words}", "", skipped=0.5, rank=rank, nested=nested
        )
        for rank in (4, 8)
        for name, words, nested in (("rank", "", False), ("nested", " of one run for all", True))
    },
    "nested16-50": Arm(
        "50 %, selected, rank 16 of one run for all", "", skipped=0.5, rank=16, nested=True
    ),
}
"""In the order they run: those that the claims are about come first."""


Skips = tuple[int, int, Sequence[tuple[int, int]]]
"""Skipped first blocks n, last ones m, and runs [first, end) between trained ones."""


def lora_blocks(arm: Arm, layers: int, select: Callable[[int, str], Skips]) -> list[int]:
    """Numbers of the blocks that carry LoRA, ascending.

    Args:
        arm: which.
        layers: blocks of the model.
        select: number of skipped blocks, and "selected", "drawn" or "proposed" -> which.
    """
    k = round(arm.skipped * layers)
    first = (layers - k) // 2
    fixed: dict[str, Skips] = {
        "first": (k, 0, []),
        "last": (0, k, []),
        "middle": (0, 0, [(first, first + k)]),
        "split": (*split_by_ratio(layers, k / layers), []),
    }
    return trained_blocks(layers, *(fixed.get(arm.where) or select(k, arm.where)))


def ranks_by_block(
    worth: Sequence[float], rank: int, least: float = 0.25, most: float = 2.0
) -> list[int]:
    """Ranks in proportion to what blocks are worth, whose sum is at most that of ``rank`` each.

    Args:
        worth: of each block; what is below 0 counts as 0.
        rank: mean of the ranks.
        least, most: limits of a rank, as shares of ``rank``.

    Example:
        >>> ranks_by_block([0.0, 1.0, 3.0], 8)
        [2, 6, 16]
    """
    positive = [max(value, 0.0) for value in worth]
    low, high = (round(share * rank) for share in (least, most))

    def at(scale: float) -> list[int]:
        return [min(max(round(scale * value), low), high) for value in positive]

    asked = rank * len(worth)
    below, above = 0.0, asked / max(min((v for v in positive if v), default=1.0), 1e-9)
    for _ in range(64):
        middle = (below + above) / 2
        below, above = (middle, above) if sum(at(middle)) < asked else (below, middle)
    ranks = at(above)
    # Rounding leaves a few over: they are taken from the largest.
    for _ in range(sum(ranks) - asked):
        ranks[ranks.index(max(ranks))] -= 1
    return ranks


@dataclass(frozen=True)
class Claim:
    """A statement about paired differences, same subject and seed: ``better`` less ``worse``.

    Attributes:
        says: in words.
        source: where the paper has it.
        pairs: (better, worse) arms; every pair must hold.
        margin: standard errors the difference must exceed; 0 for "at least as good".
    """

    says: str
    source: str
    pairs: tuple[tuple[str, str], ...]
    margin: float


CLAIMS = (
    Claim(
        "residuals beat no residuals at every ratio",
        "Table 2",
        tuple((f"skip-{percent}", f"bare-{percent}") for percent in (30, 40, 50)),
        2.0,
    ),
    Claim(
        "so they do with blocks selected by pictures, as the paper selects",
        "Table 2",
        tuple((f"drawn-{percent}", f"drawn-bare-{percent}") for percent in (30, 40, 50)),
        2.0,
    ),
    Claim(
        "the selected blocks are at least as good as first only and last only",
        "Table 4",
        (("skip-50", "first-50"), ("skip-50", "last-50")),
        0.0,
    ),
    Claim(
        "so are blocks selected by pictures, as the paper selects",
        "Table 4",
        (("drawn-50", "first-50"), ("drawn-50", "last-50")),
        0.0,
    ),
    Claim(
        "low to high is at least as good as plain resize",
        "Table 11",
        (("low-to-high", "resize"),),
        0.0,
    ),
    Claim(
        "a run skipped between trained blocks beats the selected ends where it is proposed",
        "",
        (
            ("between-6", "skip-50"),
            *((f"between-{blocks}", f"ends-{blocks}") for blocks in (8, 9, 10)),
        ),
        2.0,
    ),
    Claim(
        "a fresh tail beats a stored one at 40 and 50 %",
        "",
        tuple((f"{FRESH}-{percent}", f"{STORED}-{percent}") for percent in (40, 50)),
        2.0,
    ),
    Claim(
        "a gradient through the tail is at least as good as a fresh tail",
        "",
        tuple((f"{THROUGH}-{percent}", f"{FRESH}-{percent}") for percent in (40, 50)),
        0.0,
    ),
)
PAST = {
    **dict.fromkeys(
        (
            *(f"{name}-50" for name in ("window", "ring", "context", "margin")),
            *(f"{name}-50" for name in ("four", "window-four", "ring-four", "context-four")),
            *(f"{name}-50" for name in ("context-cells", "context-four-fresh", "best")),
            *(f"{name}-50" for name in ("window-fresh", "window-four-fresh")),
            *(f"spread{name}-50" for name in ("", "-counted")),
            *(f"{name}-50" for name in ("margin-four", "told", "mixed", "refreshed")),
            *(f"{name}-50" for name in ("easy-first", "hard-first", "by-rows", "orthogonal")),
            *(
                f"{name}-50"
                for name in ("by-block", "emphasis", "int4", "int4-srr", "int4-odlri", "nested16")
            ),
        ),
        "skip-50",
    ),
    "nested4-50": "rank4-50",
    "nested8-50": "rank8-50",
    "fresh-50": "stored-50",
    "through-50": "stored-50",
}
"""Arms past the paper -> the arm that each is compared with, pair by pair."""
SHARE_CLAIM = ("skip-30", "full", 0.98)
"""The first arm improves on the base model by at least this share of what the second does."""
