"""The best plan within a budget: every combination of skipped blocks, kind of tail, patch, rank and
variant.

There are tens of thousands of plans and the cost of each is a sum, so all of them are compared and
no better one can be missed. A plan's score is a sum of what the plan gives up against LoRA on all
blocks at full resolution:

    score = -(skipped + patch + rank + weights)

    skipped, patch, rank
              `edge_dit.budget.quality`: shares of full LoRA's gain, calibrated on two small models.
              Without a selection measured on the model, skipped is 1.47 (n / L)^4 + 5.49 (m / L)^4.
              At 50 % this meets the paper's ablation of FLUX, which lost 9.2 % of DINO with the
              first half skipped and 34.4 % with the last (docs/method.md, Table 2)
    weights   WEIGHTS_PENALTY by dtype, on the safe side: on the two small models int8 and int4 lost
              nothing beyond errors of 0.1 % (docs/method.md, "Four bits")

So the score orders plans; what is printed as a share of full LoRA's gain is without the weights'
term, and only where the model's blocks were measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, log2
from typing import Any

from edge_dit.budget.cost import Shapes, Windows
from edge_dit.budget.footprint import MEMORY_ERROR, TIME_ERROR, Footprint, Footprints, Profile
from edge_dit.budget.limits import Limits
from edge_dit.budget.quality import THROUGH_SHARE, quality, skip_cost, tail_cost, terms_of_patch
from edge_dit.contract.names import MOMENTS, STORED, Tail
from edge_dit.contract.split import trained_blocks
from edge_dit.contract.targets import (
    INT8,
    INT8_VARIANTS,
    TARGETS,
    VARIANTS,
    WIDE,
    TargetVariant,
    variant_of,
)
from edge_dit.errors import BadInput
from edge_dit.models.checkpoint import meta_model
from edge_dit.models.families import family_of
from edge_dit.models.families.family import Family
from edge_dit.planning.plan import Plan, model_of
from edge_dit.planning.selection import Selection
from edge_dit.text import size

GIB = 2**30
WEIGHTS_PENALTY = {"float32": 0.0, "float16": 0.001, "int8": 0.005, "int4": 0.01}
MARGIN, TIME_MARGIN = 1 / (1 - MEMORY_ERROR), 1 / (1 - TIME_ERROR)
"""A plan fits if its predicted memory (time) times this margin is within the limit. So a prediction
that is too low by the largest error seen still keeps to the limit."""
PATCHES = (1.0, 0.75, 0.5)
"""Patch sides that are compared, as fractions of `Bounds.s_min`."""
RANKS = (1.0, 0.5, 0.25)
"""Ranks that are compared, as fractions of `Bounds.rank`."""


@dataclass(frozen=True)
class Bounds:
    """Upper bounds of the search.

    Attributes:
        s_min: largest side of a patch, pixels.
        s_max: largest side of a crop, pixels; full resolution.
        multiple: pixels of a token's side.
        text_tokens: length of the text.
        rank: largest LoRA rank.
        draws: number of draws in the bank.
        lora_targets: modules within a block that carry LoRA; default the family's.
        bank_dtype: dtype of the bank's large tensors.
        head_skip: number of leading blocks to skip, n, where the search must not choose it.
        tail_skip: number of trailing blocks to skip, m, where the search must not choose it.
        tail: what takes their place, where the search must not choose it.
        token_step: sides of patches are multiples of so many tokens.
        kept: copies of the LoRA that a run keeps besides (`Plan.kept`).
        moments: how many the optimizer keeps of each of its parameters.
        windows: whether patches are windows.
        surroundings: whether blocks are given what is around them.
    """

    s_min: int
    s_max: int
    multiple: int
    text_tokens: int
    rank: int
    draws: int
    lora_targets: Sequence[str] | None = None
    bank_dtype: str = "float32"
    head_skip: int | None = None
    tail_skip: int | None = None
    tail: Tail | None = None
    token_step: int = 1
    kept: int = 0
    moments: int = len(MOMENTS)
    windows: bool = False
    surroundings: bool = False

    def sides(self) -> list[int]:
        """Sides of the patches to compare, pixels, the largest first."""
        step = self.multiple * self.token_step
        counts = (max(1, int(self.s_min * share) // step) for share in PATCHES)
        return list(dict.fromkeys(step * count for count in counts))

    def ranks(self) -> list[int]:
        """LoRA ranks to compare, the largest first."""
        return list(dict.fromkeys(max(1, round(self.rank * share)) for share in RANKS))


def bounds_of(
    plan: Plan,
    head_skip: int | None = None,
    tail_skip: int | None = None,
    tail: Tail | None = None,
) -> Bounds:
    """The sizes of a plan as upper bounds.

    Args:
        plan: its split is not read.
        head_skip: number of leading blocks to skip, if it is fixed.
        tail_skip: number of trailing blocks to skip, if it is fixed.
        tail: what takes their place, if it is fixed.
    """
    return Bounds(
        s_min=plan.s_min,
        s_max=plan.s_max,
        multiple=plan.multiple,
        text_tokens=plan.text_tokens,
        rank=plan.rank,
        draws=plan.draws,
        lora_targets=plan.lora_targets,
        bank_dtype=plan.bank_dtype,
        head_skip=head_skip,
        tail_skip=tail_skip,
        tail=tail,
        token_step=family_of(plan.family).token_step,
        kept=plan.kept,
        moments=len(plan.optimizer.moments),
        windows=plan.window,
        surroundings=plan.surroundings,
    )


@dataclass(frozen=True)
class Option:
    """A point of the search space.

    Attributes:
        head_skip: number of leading blocks to skip, n.
        tail_skip: number of trailing blocks to skip, m.
        s_min: side of a patch, pixels.
        rank: LoRA rank.
        variant: target, layout and dtype of the stored weights.
        inner_skips: runs [first, end) of blocks to skip between trained ones.
        tail: what takes the place of the trailing blocks.
    """

    head_skip: int
    tail_skip: int
    s_min: int
    rank: int
    variant: TargetVariant
    inner_skips: tuple[tuple[int, int], ...] = ()
    tail: Tail = STORED

    def applied_to(self, plan: Plan) -> Plan:
        """``plan`` with this option's split, sizes and variant. alpha / rank stays."""
        update = {
            "head_skip": self.head_skip,
            "tail_skip": self.tail_skip,
            "inner_skips": list(self.inner_skips),
            "tail": self.tail,
            "s_min": self.s_min,
            "rank": self.rank,
            "alpha": plan.alpha * self.rank / plan.rank,
            "targets": [self.variant.target],
            "layout": self.variant.layout,
            "weights": self.variant.dtype,
            "compute": self.variant.compute,
            "recompute": self.variant.layout == "recompute",
        }
        return plan.model_copy(update=update)


@dataclass(frozen=True)
class Candidate:
    """An option with its predicted footprint and its score.

    Attributes:
        option: the point of the search space.
        footprint: what training it takes.
        score: 0 for a plan that gives nothing up, less for others; see the module.
    """

    option: Option
    footprint: Footprint
    score: float

    def storage(self, draws: int) -> int:
        """Bytes of bundle and bank.

        Args:
            draws: number of draws in the bank.
        """
        return self.footprint.bundle + draws * self.footprint.draw

    def in_words(self) -> str:
        """The option and its footprint for people."""
        option, footprint = self.option, self.footprint
        between = "".join(f", [{first}, {end}) between" for first, end in option.inner_skips)
        return (
            f"{option.variant}, skip {option.head_skip} before and {option.tail_skip} after"
            f"{_named(option)}{between}, patch {option.s_min} px, rank {option.rank}: "
            f"{size(footprint.anonymous)} anonymous and {size(footprint.file)} of files, "
            f"{footprint.seconds:.3g} s a step{_reading(footprint)}"
        )


@dataclass(frozen=True)
class Space:
    """The plans to compare.

    Attributes:
        layers: number of the model's blocks, L.
        bounds: upper bounds.
        patches: footprints by s_min, in pixels.
        variants: variants to compare.
        selection: measured on the model, or None.
    """

    layers: int
    bounds: Bounds
    patches: dict[int, Footprints]
    variants: Sequence[TargetVariant]
    selection: Selection | None = None

    def splits(self) -> Iterator[tuple[int, int, tuple[tuple[int, int], ...]]]:
        """Every (head_skip, tail_skip, inner_skips): all (n, m), and those with a run between
        trained blocks that was measured to be better.
        """
        for head in range(self.layers):
            for tail in range(self.layers - head):
                yield head, tail, ()
        for split in self.selection.between if self.selection else ():
            if split.better:
                yield split.head_skip, split.tail_skip, (split.run,)

    def skip_penalty(
        self,
        head_skip: int,
        tail_skip: int,
        inner_skips: Sequence[tuple[int, int]] = (),
        tail: Tail = STORED,
    ) -> float:
        """The term "skipped" of the score; see the module."""
        if self.selection is not None:
            split = head_skip, tail_skip, inner_skips
            return quality().factors.skipped * skip_cost(self.selection, split, tail)
        stored = 5.49 * (tail_skip / self.layers) ** 4
        own = tail_cost(stored, THROUGH_SHARE * stored, tail)
        return 1.47 * (head_skip / self.layers) ** 4 + own

    def missing(self, option: Option) -> float:
        """The share of full LoRA's gain that an option is predicted to miss; see the module."""
        share, bounds = option.s_min / self.bounds.s_max, self.bounds
        patch = terms_of_patch(share, bounds.windows, bounds.surroundings)
        halvings = log2(self.bounds.rank / option.rank)
        skipped = self.skip_penalty(
            option.head_skip, option.tail_skip, option.inner_skips, option.tail
        )
        return skipped + quality().missing(replace(patch, rank=halvings))

    def score(self, option: Option) -> float:
        """Score of an option; see the module."""
        return -(self.missing(option) + WEIGHTS_PENALTY[option.variant.dtype])

    def ranked_by(self) -> str:
        """Where the terms of the score come from, for people."""
        source = "measured on this model" if self.selection else "from the paper's ablation of FLUX"
        return (
            f"blocks skipped ({source}), patch and rank (measured on two small models), "
            "weights (a guess on the safe side)"
        )

    def options(self) -> Iterator[Option]:
        """Every combination."""
        for head, tail, inner in self.splits():
            if self.bounds.head_skip not in (None, head):
                continue
            if self.bounds.tail_skip not in (None, tail):
                continue
            for patch in self.patches:
                for rank in self.bounds.ranks():
                    for variant in self.variants:
                        for kind in self.tails(tail, inner, variant):
                            yield Option(head, tail, patch, rank, variant, inner, kind)

    def tails(
        self, tail_skip: int, inner_skips: Sequence[tuple[int, int]], variant: TargetVariant
    ) -> tuple[Tail, ...]:
        """What may take the place of a tail. Runs between trained blocks were measured with a
        stored one only.
        """
        if not tail_skip:
            return (STORED,)
        can = (STORED,) if inner_skips else TARGETS[variant.target].tails
        return can if self.bounds.tail is None else tuple(t for t in can if t == self.bounds.tail)

    def candidate(self, option: Option, ram: float = inf) -> Candidate:
        """An option with its footprint, where there are ``ram`` bytes of memory, and score."""
        ends = self.layers, option.head_skip, option.tail_skip
        trained = tuple(trained_blocks(*ends, option.inner_skips))
        patch = self.patches[option.s_min]
        footprint = patch.of(trained, option.rank, option.variant, option.tail, ram)
        return Candidate(option, footprint, self.score(option))

    def candidates(self, ram: float = inf) -> list[Candidate]:
        """Every combination where there are ``ram`` bytes of memory, best first: by score, then by
        time, then by memory.
        """

        def order(candidate: Candidate) -> tuple[float, float, int]:
            return -candidate.score, candidate.footprint.seconds, candidate.footprint.ram

        return sorted((self.candidate(option, ram) for option in self.options()), key=order)

    def fits(self, candidate: Candidate, limits: Limits) -> bool:
        """Whether a candidate keeps to all limits, with the margins to spare."""
        footprint = candidate.footprint
        return (
            MARGIN * footprint.ram <= limits.ram
            and MARGIN * candidate.storage(self.bounds.draws) <= limits.flash
            and TIME_MARGIN * footprint.seconds <= limits.seconds
        )


@dataclass(frozen=True)
class Choice:
    """Result of a search.

    Attributes:
        limits: the budget.
        best: first of the candidates within it.
        ideal: first of all candidates.
        more: first of the candidates within one GiB of memory more; None if it is no better.
        compared: number of candidates.
        fitting: number of those within the budget.
        ranked_by: where the terms of the score come from.
    """

    limits: Limits
    best: Candidate
    ideal: Candidate
    more: Candidate | None
    compared: int
    fitting: int
    ranked_by: str

    def in_words(self) -> list[str]:
        """The best plan, what it gives up for the budget, and what one GiB more would allow."""
        budget = self.limits.in_words()
        lines = [
            f"best of {self.compared:,} plans within {budget}; {self.fitting:,} fit",
            f"  {self.best.in_words()}",
        ]
        if given_up := differences(self.ideal.option, self.best.option):
            lines.append(f"  given up for it: {', '.join(given_up)}")
        if self.more is not None:
            gained = differences(self.best.option, self.more.option)
            lines.append(f"  1 GiB more would allow: {', '.join(gained)}")
        return [*lines, f"  ranked by {self.ranked_by}"]


def choose(space: Space, limits: Limits) -> Choice:
    """The best plan within ``limits``.

    Raises:
        BadInput: no plan fits; the message names limits that some plan would fit.
    """
    everything = space.candidates(limits.ram)
    fitting = [candidate for candidate in everything if space.fits(candidate, limits)]
    if not fitting:
        raise _nothing_fits(space, everything, limits)
    best = fitting[0]
    wider = replace(limits, ram=limits.ram + GIB)
    more = next(candidate for candidate in everything if space.fits(candidate, wider))
    return Choice(
        limits=limits,
        best=best,
        ideal=everything[0],
        more=more if more.score > best.score else None,
        compared=len(everything),
        fitting=len(fitting),
        ranked_by=space.ranked_by(),
    )


def _nothing_fits(space: Space, everything: list[Candidate], limits: Limits) -> BadInput:
    """The error that names, for each limit, the least value with which some plan would fit while
    the other limits stay.
    """
    needs = {
        "ram": lambda c: MARGIN * c.footprint.ram,
        "flash": lambda c: MARGIN * c.storage(space.bounds.draws),
        "seconds": lambda c: TIME_MARGIN * c.footprint.seconds,
    }
    remedies = []
    for name, need in needs.items():
        without = replace(limits, **{name: inf})
        enough = [candidate for candidate in everything if space.fits(candidate, without)]
        if enough:
            least = min(enough, key=need)
            amount = need(least)
            words = f"{amount:.3g} s a step" if name == "seconds" else f"{size(amount)} of {name}"
            remedies.append(f"{words} ({least.in_words()})")
    return BadInput(
        "budget",
        found=f"no plan fits {limits.in_words()}",
        expected="a budget that some plan fits",
        remedy="give " + ", or ".join(remedies) if remedies else "raise several limits together",
    )


def differences(one: Option, other: Option) -> list[str]:
    """What changes from one option to the other, in words."""
    rows = (
        ("blocks skipped", _skipped(one), _skipped(other)),
        ("patch", f"{one.s_min} px", f"{other.s_min} px"),
        ("rank", str(one.rank), str(other.rank)),
        ("run as", str(one.variant), str(other.variant)),
    )
    return [f"{name} {before} -> {after}" for name, before, after in rows if before != after]


def _reading(footprint: Footprint) -> str:
    """What a step reads in words, where it reads."""
    return f", in which {size(footprint.read)} of weights are read" if footprint.read else ""


def _named(option: Option) -> str:
    """The tail in brackets, where there is one."""
    return f" ({option.tail})" if option.tail_skip else ""


def _skipped(option: Option) -> str:
    return f"{option.head_skip}+{option.tail_skip}{_named(option)}" + "".join(
        f"+[{first}, {end})" for first, end in option.inner_skips
    )


def space_of(
    family: Family,
    config: dict[str, Any],
    bounds: Bounds,
    profile: Profile,
    variants: Sequence[TargetVariant] = VARIANTS,
    selection: Selection | None = None,
) -> Space:
    """The plans of a model that are to be compared.

    Args:
        family: the model's family.
        config: the transformer's configuration.
        bounds: upper bounds of the search.
        profile: of the device.
        variants: variants to compare.
        selection: measured on the model, if there is one.
    """
    model, patches = meta_model(family, config), {}
    windows = None
    if bounds.windows:
        windows = Windows(bounds.s_max // bounds.multiple, bounds.surroundings)
    for side in bounds.sides():
        grid = (side // bounds.multiple, side // bounds.multiple)
        own = bounds.lora_targets, bounds.moments, windows
        shapes = Shapes(family, model, grid, bounds.text_tokens, *own)
        patches[side] = Footprints(shapes, profile, bounds.bank_dtype, bounds.kept)
    layers = len(family.block_names(config))
    return Space(layers, bounds, patches, variants, selection)


def plan_within(
    plan: Plan,
    bounds: Bounds,
    limits: Limits,
    profile: Profile,
    variants: Sequence[TargetVariant],
    selection: Selection | None = None,
) -> tuple[Plan, Choice]:
    """The best plan within ``limits``, and why.

    Args:
        plan: gives the model and all that a budget does not decide (optimizer, steps, seed).
        bounds: upper bounds of the search, see `bounds_of`.
        limits: the budget.
        profile: of the device.
        variants: variants to compare.
        selection: measured on the model, if there is one.

    Raises:
        BadInput: no plan fits; the message names limits that some plan would fit.
    """
    model = model_of(plan, check=False)
    space = space_of(model.family, model.config, bounds, profile, variants, selection)
    choice = choose(space, limits)
    return choice.best.option.applied_to(plan), choice


def variants_of(targets: Sequence[str], compute: str = WIDE) -> list[TargetVariant]:
    """Every variant of some targets ("onnx") or layouts ("onnx:streamed").

    Args:
        targets: a layout's name may say how weights are stored and products computed.
        compute: how products with frozen matrices are computed where the name does not say it and
            the target can.

    Raises:
        BadInput: an unknown target, or a layout that the target does not have.
    """
    chosen = []
    for name in targets:
        every = [v for v in VARIANTS + INT8_VARIANTS if (v.target, v.compute) == (name, compute)]
        chosen += every or [_named_variant(name, compute)]
    return list(dict.fromkeys(chosen))


def _named_variant(name: str, compute: str) -> TargetVariant:
    variant = variant_of(name)
    says = (variant.dtype, variant.compute) != (WIDE, WIDE)
    if says or compute == WIDE or compute not in TARGETS[variant.target].computes:
        return variant
    return replace(variant, dtype=INT8, compute=compute)
