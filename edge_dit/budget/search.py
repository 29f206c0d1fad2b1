"""The one knob: a budget in bytes, and the best plan that fits it.

Every combination of skipped blocks, patch size, rank and way to train is looked at - there are some
ten thousand and each is a sum - so nothing better was missed. Better is what is expected to keep
more of what LoRA on all blocks at full resolution and rank would learn:

    quality = (1 - skipped) (1 - patch) (1 - rank) (1 - weights)

    skipped   of a measured selection: (head[n] + tail[m]) / head[L], the share of the tuning's
              effect that lies in the skipped blocks (`edge_dit.planning.selection`); where a run
              between trained blocks was measured to be better, that of the best head and tail of as
              many blocks less what was gained; without a selection:
              1.47 (n / L)^4 + 5.49 (m / L)^4, which meets the paper's FLUX ablation at 50 %: first
              only 9.2 %, last only 34.4 % of DINO lost, and its selected split 2.4 % (Table 2)
    patch     0.02 (1 - s_min / s_max): 1 % at half the side (Table 2: DINO 0.7253 of 0.7324)
    rank      0.5 % for every halving of the rank asked for: assumed
    weights   0.1 % for float16, 0.5 % for int8: assumed

A ranking, not a promise. What a job asks for is the most that is looked at: patch and rank may
shrink, the targets are those it names.

Predictions are off by up to a tenth in memory and a quarter in time, so a plan fits when it does
with that much to spare (tests/benchmarks/footprint.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, log2
from typing import Any

from edge_dit.budget.cost import Shapes
from edge_dit.budget.footprint import Footprint, Footprints, Profile
from edge_dit.budget.limits import Limits
from edge_dit.contract.targets import VARIANTS, TargetVariant, variant_of
from edge_dit.errors import BadInput
from edge_dit.models.families.family import Family
from edge_dit.planning.plan import Plan, model_of, trained_blocks
from edge_dit.planning.selection import Selection
from edge_dit.text import size

GIB = 2**30
PATCH_LOSS, RANK_LOSS = 0.02, 0.005
WEIGHTS_LOSS = {"float32": 0.0, "float16": 0.001, "int8": 0.005}
MARGIN, TIME_MARGIN = 1.1, 1.25
"""What is predicted times this must fit."""
PATCHES = (1.0, 0.75, 0.5)
"""Of the patch asked for."""
RANKS = (1.0, 0.5, 0.25)
"""Of the rank asked for."""


@dataclass(frozen=True)
class Option:
    """One plan that could be made.

    Attributes:
        head_skip, tail_skip: n and m.
        s_min: pixels.
        rank: of the LoRA.
        execution: how it would train.
        inner_skips: runs [first, end) skipped between trained blocks.
    """

    head_skip: int
    tail_skip: int
    s_min: int
    rank: int
    execution: TargetVariant
    inner_skips: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Candidate:
    """An option, what it takes and what is expected of it."""

    option: Option
    footprint: Footprint
    quality: float

    def storage(self, draws: int) -> int:
        """Bytes of bundle and bank.

        Args:
            draws: in the bank.
        """
        return self.footprint.bundle + draws * self.footprint.draw


@dataclass(frozen=True)
class Space:
    """What may be chosen from.

    Attributes:
        layers: blocks of the model, L.
        s_max: pixels.
        patches: s_min -> footprints at that size.
        ranks: of the LoRA, the one asked for first.
        executions: ways to train.
        draws: size of the bank.
        selection: measured, or None.
        head, tail: n and m where they are given.
    """

    layers: int
    s_max: int
    patches: dict[int, Footprints]
    ranks: Sequence[int]
    executions: Sequence[TargetVariant]
    draws: int
    selection: Selection | None = None
    head: int | None = None
    tail: int | None = None

    def splits(self) -> Iterator[tuple[int, int, tuple[tuple[int, int], ...]]]:
        """Every (n, m), and those with a run between that were measured to be better."""
        for head in range(self.layers):
            for tail in range(self.layers - head):
                yield head, tail, ()
        for split in self.selection.between if self.selection else ():
            if split.better:
                yield split.head_skip, split.tail_skip, (split.run,)

    def lost(
        self, head_skip: int, tail_skip: int, inner_skips: Sequence[tuple[int, int]] = ()
    ) -> float:
        """Share of full LoRA's effect lost with the skipped blocks, see the module."""
        if self.selection is None:
            head, tail = head_skip / self.layers, tail_skip / self.layers
            return 1.47 * head**4 + 5.49 * tail**4
        score = self.selection.score(head_skip, tail_skip, inner_skips)
        return min(1.0, max(0.0, score / self.selection.head[self.layers]))

    def quality(self, option: Option) -> float:
        """See the module."""
        kept = 1 - self.lost(option.head_skip, option.tail_skip, option.inner_skips)
        patch = 1 - PATCH_LOSS * (1 - option.s_min / self.s_max)
        rank = 1 - RANK_LOSS * log2(self.ranks[0] / option.rank)
        return kept * patch * rank * (1 - WEIGHTS_LOSS[option.execution.dtype])

    def options(self) -> Iterator[Option]:
        """Every combination."""
        for head, tail, inner in self.splits():
            if self.head not in (None, head) or self.tail not in (None, tail):
                continue
            for patch in self.patches:
                for rank in self.ranks:
                    for execution in self.executions:
                        yield Option(head, tail, patch, rank, execution, inner)

    def candidate(self, option: Option) -> Candidate:
        """An option with its footprint and quality."""
        ends = self.layers, option.head_skip, option.tail_skip
        trained = tuple(trained_blocks(*ends, option.inner_skips))
        footprints = self.patches[option.s_min]
        found = footprints.of(trained, option.rank, option.execution)
        return Candidate(option, found, self.quality(option))

    def candidates(self) -> list[Candidate]:
        """Every combination, best first: by quality, then by time, then by memory."""
        found = [self.candidate(option) for option in self.options()]
        order = lambda c: (-c.quality, c.footprint.seconds, c.footprint.ram)  # noqa: E731
        return sorted(found, key=order)

    def fits(self, candidate: Candidate, limits: Limits) -> bool:
        """Whether a candidate keeps to all limits."""
        found = candidate.footprint
        return (
            MARGIN * found.ram <= limits.ram
            and MARGIN * candidate.storage(self.draws) <= limits.flash
            and TIME_MARGIN * found.seconds <= limits.seconds
        )


@dataclass(frozen=True)
class Choice:
    """What a budget buys.

    Attributes:
        limits: the budget.
        best: the best candidate within it.
        ideal: the best without any limit.
        more: the best within one GiB of memory more, or None where that is `best`.
        looked_at: number of candidates.
    """

    limits: Limits
    best: Candidate
    ideal: Candidate
    more: Candidate | None
    looked_at: int

    def in_words(self) -> list[str]:
        """What was given up for the budget, and what the next GiB would buy."""
        lines = [
            f"best of {self.looked_at} plans within {self.limits.in_words()}: expected to "
            f"keep {self.best.quality:.1%} of what full LoRA learns",
            f"  {_candidate_in_words(self.best)}",
        ]
        given_up = differences(self.ideal.option, self.best.option)
        if given_up:
            words = f"  given up for it: {', '.join(given_up)}"
            lines.append(f"{words}; without limits {self.ideal.quality:.1%}")
        if self.more is not None:
            gain = ", ".join(differences(self.best.option, self.more.option))
            lines.append(f"  1 GiB more would buy {self.more.quality:.1%}: {gain}")
        return lines


def choose(space: Space, limits: Limits) -> Choice:
    """The best plan within ``limits``.

    Raises:
        BadInput: nothing fits; says what would.
    """
    everything = space.candidates()
    fitting = (c for c in everything if space.fits(c, limits))
    best = next(fitting, None)
    if best is None:
        raise _nothing_fits(space, everything, limits)
    wider = replace(limits, ram=limits.ram + GIB)
    more = next(c for c in everything if space.fits(c, wider))
    gained = more if more.quality > best.quality else None
    return Choice(limits, best, everything[0], gained, len(everything))


def _nothing_fits(space: Space, everything: list[Candidate], limits: Limits) -> BadInput:
    """Names the least that each limit would have to be, the others as they are."""
    needs = {
        "ram": lambda c: MARGIN * c.footprint.ram,
        "flash": lambda c: MARGIN * c.storage(space.draws),
        "seconds": lambda c: TIME_MARGIN * c.footprint.seconds,
    }
    remedies = []
    for name, need in needs.items():
        without = replace(limits, **{name: inf})
        enough = [c for c in everything if space.fits(c, without)]
        if enough:
            least = min(enough, key=need)
            amount = need(least)
            said = f"{amount:.2g} s a step" if name == "seconds" else f"{size(amount)} of {name}"
            remedies.append(f"{said} ({_candidate_in_words(least)})")
    return BadInput(
        "budget",
        found=f"no plan fits {limits.in_words()}",
        expected="a budget that some plan fits",
        remedy="give " + ", or ".join(remedies) if remedies else "raise several limits together",
    )


def differences(one: Option, other: Option) -> list[str]:
    """What changes from one option to the other, in words."""
    told = (
        ("blocks skipped", _skipped(one), _skipped(other)),
        ("patch", f"{one.s_min} px", f"{other.s_min} px"),
        ("rank", str(one.rank), str(other.rank)),
        ("run as", str(one.execution), str(other.execution)),
    )
    return [f"{name} {before} -> {after}" for name, before, after in told if before != after]


def _skipped(option: Option) -> str:
    return f"{option.head_skip}+{option.tail_skip}" + "".join(
        f"+[{first}, {end})" for first, end in option.inner_skips
    )


def _candidate_in_words(candidate: Candidate) -> str:
    option, found = candidate.option, candidate.footprint
    between = "".join(f", [{first}, {end}) between" for first, end in option.inner_skips)
    return (
        f"{option.execution}, skip {option.head_skip} before and {option.tail_skip} after{between}"
        f", patch {option.s_min} px, rank {option.rank}: {size(found.anonymous)} anonymous and "
        f"{size(found.file)} of files, {found.seconds:.2g} s a step"
    )


def space_of(
    family: Family,
    config: dict[str, Any],
    asked: Asked,
    profile: Profile,
    executions: Sequence[TargetVariant] = VARIANTS,
    selection: Selection | None = None,
) -> Space:
    """What may be chosen from for a model.

    Args:
        family: of the model.
        config: of the transformer.
        asked: the most that is looked at.
        profile: of the device.
        executions: ways to train.
        selection: of the model, if it was measured.
    """
    sides = {
        max(1, int(asked.s_min * share) // asked.multiple) * asked.multiple: None
        for share in PATCHES
    }
    patches = {}
    for side in sides:
        tokens = side // asked.multiple
        shapes = Shapes(family, config, (tokens, tokens), asked.text_tokens, asked.lora_targets)
        patches[side] = Footprints(shapes, profile, asked.bank)
    ranks = dict.fromkeys(max(1, round(asked.rank * share)) for share in RANKS)
    return Space(
        layers=len(family.block_names(config)),
        s_max=asked.s_max,
        patches=patches,
        ranks=list(ranks),
        executions=executions,
        draws=asked.draws,
        selection=selection,
        head=asked.head_skip,
        tail=asked.tail_skip,
    )


@dataclass(frozen=True)
class Asked:
    """The most that is looked at, see `edge_dit.planning.plan.Plan` for the fields.

    Attributes:
        head_skip, tail_skip: where they are not to be chosen.
        lora_targets: default the family's.
        bank: dtype of the bank's large tensors.
    """

    s_min: int
    s_max: int
    multiple: int
    text_tokens: int
    rank: int
    draws: int
    lora_targets: Sequence[str] | None = None
    bank: str = "float32"
    head_skip: int | None = None
    tail_skip: int | None = None


def plan_within(
    plan: Plan,
    limits: Limits,
    profile: Profile,
    executions: Sequence[TargetVariant],
    selection: Selection | None = None,
    head_skip: int | None = None,
    tail_skip: int | None = None,
) -> tuple[Plan, Choice]:
    """The best plan within ``limits``, and why.

    Args:
        plan: of the job, without a budget: the most that is looked at. alpha shrinks with the rank.
        limits: the budget.
        profile: of the device.
        executions: ways to train.
        selection: of the model, if it was measured.
        head_skip, tail_skip: where they are not to be chosen.

    Raises:
        BadInput: nothing fits; says what would.
    """
    model = model_of(plan, check=False)
    asked = Asked(
        s_min=plan.s_min,
        s_max=plan.s_max,
        multiple=plan.multiple,
        text_tokens=plan.text_tokens,
        rank=plan.rank,
        draws=plan.draws,
        lora_targets=plan.lora_targets,
        bank=plan.bank_dtype,
        head_skip=head_skip,
        tail_skip=tail_skip,
    )
    space = space_of(model.family, model.config, asked, profile, executions, selection)
    choice = choose(space, limits)
    option = choice.best.option
    update = {
        "head_skip": option.head_skip,
        "tail_skip": option.tail_skip,
        "inner_skips": list(option.inner_skips),
        "s_min": option.s_min,
        "rank": option.rank,
        "alpha": plan.alpha * option.rank / plan.rank,
        "targets": [option.execution.target],
        "layout": option.execution.layout,
        "weights": option.execution.dtype,
        "recompute": option.execution.layout == "recompute",
    }
    return plan.model_copy(update=update), choice


def variants_of(targets: Sequence[str]) -> list[TargetVariant]:
    """Every way to train on some targets, or on their layouts ("onnx:streamed").

    Raises:
        BadInput: an unknown target, or a layout it has not.
    """
    found = []
    for name in targets:
        every = [execution for execution in VARIANTS if execution.target == name]
        found += every or [variant_of(name)]
    return list(dict.fromkeys(found))
