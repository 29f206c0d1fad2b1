"""Is a bank what its plan and model make? Some stored draws are recomputed and compared.

An export is compared with PyTorch at draws of the bank. If the bank itself is wrong, both read the
same wrong numbers. So draws are made again, by `edge_dit.reference.precompute`'s own functions,
from what is at hand:

- With a draw's picture, all of it.
- Without it, the noise follows from the draw's seed. Where the target is eps - x_0, noise and
  stored target give the clean latents, and the rest of the draw follows. That finds every bank
  whose parts do not belong together; not one that was made of another picture.
- Where the target says nothing of the picture (PixArt's is the noise alone), or the text encoder
  is missing in a joint family, residuals are recomputed from the stored entry state.
- A window is part of a picture that passed the frozen blocks whole. Without the picture only its
  conditioning is recomputed.

What index.json says of all draws is compared with the plan (`edge_dit.reference.index_claims`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edge_dit.contract.bank import INDEX, Bank, Draw, Index, is_halved
from edge_dit.contract.certificate import BankResult, Difference, differences
from edge_dit.contract.names import (
    COND,
    ENTRY,
    RESIDUAL,
    RESIDUAL_TEXT,
    STATE,
    STORED,
    TAIL_RESIDUAL,
    TARGET,
    WEIGHT,
    WEIGHT_MASK,
)
from edge_dit.contract.noise import NOISE
from edge_dit.errors import BadInput
from edge_dit.models.checkpoint import Checkpoint
from edge_dit.models.families.family import State
from edge_dit.models.model import Model
from edge_dit.models.patch_sampler import PatchSampler
from edge_dit.models.subgraph import as_batch
from edge_dit.pictures.dataset import Captioned
from edge_dit.planning.plan import Plan
from edge_dit.reference.eager import blank_batch
from edge_dit.reference.index_claims import false_index
from edge_dit.reference.precompute import (
    Source,
    Start,
    encoders_of,
    normal_of,
    passed,
    source_of,
    tensors_of,
)

KIND = "bank"
TOLERANCES = {"float32": 1e-4, "float16": 2e-3}
"""Dtype that a tensor is stored in -> largest difference, relative to its largest value.

On the machine that made a float32 bank the bits are the same. Other processors sum in another
order: each sum is off by some 1e-7, and tens of blocks add these up. float16 rounds by up to 5e-4
of a value, 2e-3 is four times that. Without a picture a float16 bank is recomputed from rounded
tensors; where the model makes much of that, `_Work._allowed` measures how much.
"""
NUDGES, SAFETY = 4, 4.0
"""How often a draw of a float16 bank that fails is run again from other roundings, and how many
times the largest change is allowed.
"""
FLOAT16_ROUNDING = 2.0**-11
"""Largest relative error of a float16."""
REMEDY = "precompute again: edge-dit precompute JOB --plan plan.json -o bank/"
RESIDUALS = (RESIDUAL, RESIDUAL_TEXT, TAIL_RESIDUAL)


def examine(plan: Plan, model: Model, bank: Bank, images: Sequence[Captioned] = ()) -> BankResult:
    """Recompute some draws of a bank and compare them.

    One transformer block is in memory at a time, and before that the text encoders.

    Args:
        plan: of the bank.
        model: of the plan.
        bank: to examine.
        images: pictures at hand, shorter side ``plan.s_max``; those of the bank are found by their
            SHA-256.

    Raises:
        BadInput: draws do not have the tensors of the plan, a prompt is longer than the plan's, or
            ``images`` holds none of the bank's.
    """
    checkpoint = model.checkpoint(plan.held)
    skeleton = checkpoint.skeleton()
    _check_form(bank, blank_batch(plan, model))
    numbers = sampled(bank.index)
    pictures = _pictures(bank, numbers, images)
    sizes = {number: picture.pixels.shape[1:] for number, picture in pictures.items()}
    claims = false_index(plan, model, bank.index, sizes)
    source, missing = _source(plan, model, skeleton, bank, pictures)
    source = replace(source, listed=bank.index.images, weighted=plan.weighted, masked=plan.masked)
    work = _Work(plan, checkpoint, bank, source, numbers, not missing)
    return BankResult(
        index_sha256=bank.identity,
        draws=numbers,
        tensors=work.rows(),
        false_claims=claims,
        recomputed=work.recomputed(),
        out_of_reach=([missing] if missing else []) + work.out_of_reach(),
    )


def sampled(index: Index) -> list[int]:
    """Numbers of the draws that are recomputed, ascending: the first and the last, and in each half
    that of the lowest noise level, which hides least of a target; and the first prior draw.
    """
    count = len(index.draws)
    halves = range(count // 2), range(count // 2, count)
    lowest = [min(half, key=lambda n: index.draws[n].sigma) for half in halves if half]
    prior = [n for n, draw in enumerate(index.draws) if is_prior(index, draw)][:1]
    return sorted({0, count - 1, *lowest, *prior})


def is_prior(index: Index, draw: Draw) -> bool:
    """Whether a draw keeps what the base model predicts."""
    return draw.image < len(index.images) and index.images[draw.image].prior


def _check_form(bank: Bank, blank: Mapping[str, torch.Tensor]) -> None:
    """Raise `BadInput` unless every draw has the tensors of the plan, in their shapes."""
    wanted = {name: tuple(value.shape) for name, value in blank.items()}
    found, expected = "" if bank.index.draws else "no draws", "the draws of the plan"
    for number, shapes in enumerate(bank.shapes()):
        names = wanted.keys() | shapes.keys()
        if wrong := sorted(name for name in names if shapes.get(name) != wanted.get(name)):
            have, want = shapes.get(wrong[0], "none"), wanted.get(wrong[0], "none")
            found = f"draw {number}: {wrong[0]}: shape {have}"
            expected = f"shape {want}, by the plan"
            break
    if found:
        raise BadInput(bank.folder, found=found, expected=expected, remedy=REMEDY)


def _pictures(
    bank: Bank, numbers: Sequence[int], images: Sequence[Captioned]
) -> dict[int, Captioned]:
    """The pictures at hand of some draws, by number in the index."""
    at_hand = {image.sha256: image for image in images}
    listed = bank.index.images
    drawn = {bank.index.draws[n].image for n in numbers}
    sums = {number: listed[number].sha256 for number in drawn if number < len(listed)}
    found = {number: at_hand[digest] for number, digest in sums.items() if digest in at_hand}
    if images and not found:
        raise BadInput(
            "--images",
            found=f"{len(images)} pictures, none of which the bank lists by its SHA-256",
            expected="the pictures that the bank was made of",
            remedy="name their folder, or leave --images out",
        )
    return found


def _source(
    plan: Plan, model: Model, skeleton: nn.Module, bank: Bank, pictures: Mapping[int, Captioned]
) -> tuple[Source, str]:
    """What draws are made from; and why their prompts could not be encoded, then they are blank.

    Raises:
        BadInput: pictures or prompts cannot be encoded, though the model is whole.
    """
    numbers = dict.fromkeys(bank.index.draws[n].prompt for n in sampled(bank.index))
    try:
        pipeline = encoders_of(model, skeleton, vae=bool(pictures))
    except BadInput as fault:
        if pictures:
            raise
        grid, windows = plan.passing_grid, plan.window_rule
        blank = model.family.blank(skeleton, grid, plan.text_tokens)[1]
        prompts, sampler = dict.fromkeys(numbers, blank), PatchSampler(plan.crop_rule)
        source = Source(model, skeleton, None, sampler, grid, {}, prompts, windows=windows)
        part = Path(fault.where).name  # not its folder: certificates are shared
        return source, f"the prompts: {part} of the model cannot be loaded"
    prompts = {number: bank.index.prompts[number] for number in numbers}
    try:
        return source_of(plan, model, pipeline, prompts, pictures), ""
    except BadInput as fault:
        raise BadInput(
            bank.folder / INDEX,
            found=f"{fault.where} of {fault.found}",
            expected=fault.expected,
            remedy=REMEDY,
        ) from None


# ---------------------------------------------------------------- the tensors


@dataclass(frozen=True)
class _Work:
    """Recomputes draws of a bank.

    Attributes:
        plan: of the bank.
        checkpoint: of its model.
        bank: that is examined.
        source: what draws are made from; without ``text`` its prompts are blank.
        numbers: of the draws.
        text: whether prompts could be encoded.
    """

    plan: Plan
    checkpoint: Checkpoint
    bank: Bank
    source: Source
    numbers: list[int]
    text: bool

    @cached_property
    def stored(self) -> dict[int, dict[str, np.ndarray]]:
        """The stored tensors of the draws."""
        return {number: self.bank[number] for number in self.numbers}

    @cached_property
    def unknown(self) -> list[str]:
        """Conditioning that cannot be recomputed."""
        family = self.source.model.family
        if self.text:
            return []
        if family.joint:  # pooled text is part of the timestep's embedding there
            stored = self.stored[self.numbers[0]]
            return [name.removeprefix(COND) for name in stored if name.startswith(COND)]
        return list(self.plan.per_prompt(family))

    @cached_property
    def _latents(self) -> tuple[int, ...]:
        """Shape of the latents that pass the frozen blocks."""
        source = self.source
        blank, _ = source.model.family.blank(source.skeleton, source.grid, self.plan.text_tokens)
        return tuple(blank.shape)

    @property
    def unmasked(self) -> list[int]:
        """Numbers of the draws whose masks are not at hand."""
        draws, listed = self.bank.index.draws, self.source.listed
        at_hand = {n: picture.mask_sha256 for n, picture in self.source.images.items()}
        return [
            number
            for number in (self.numbers if self.plan.masked else [])
            if (image := draws[number].image) < len(listed)
            and listed[image].mask
            and at_hand.get(image) != listed[image].mask
        ]

    @property
    def pictured(self) -> list[int]:
        """Numbers of the draws whose picture is at hand."""
        return [n for n in self.numbers if self.bank.index.draws[n].image in self.source.images]

    @property
    def whole(self) -> list[int]:
        """Numbers of the draws whose latents and text are known before the first block."""
        family, objective = self.source.model.family, self.source.model.objective
        blank = torch.zeros(1)
        known = objective.clean(blank, blank) is not None and (self.text or not family.joint)
        if self.plan.window or not known:
            return self.pictured
        return [n for n in self.numbers if n in self.pictured or not self._prior(n)]

    def _prior(self, number: int) -> bool:
        """Whether a draw's target is the base model's prediction, which says nothing of its
        picture.
        """
        return is_prior(self.bank.index, self.bank.index.draws[number])

    @cached_property
    def starts(self) -> dict[int, Start]:
        """The draws before the first block. States are right there for those of `whole`."""
        return {number: self._start(number) for number in self.numbers}

    def rows(self) -> list[Difference]:
        """All differences: of prompts, then draw by draw in the order of computation."""
        found = {number: self._early(number) for number in self.numbers}
        later = self._later(self.whole)
        again = [n for n in self.numbers if n not in later or self._in_doubt(n, later[n])]
        if self.plan.window:
            again = []
        for number, follow in self._later(again, from_entry=True).items():
            if number not in later:
                later[number] = follow
            elif all(row.passed for row in follow.values()):
                states = {n: row for n, row in later[number].items() if n in STATE}
                later[number] = {f"{TARGET} to {n}": row for n, row in states.items()} | follow
        named: dict[str, Difference] = {}
        for number, early in found.items():
            for name, row in {**early, **later.get(number, {})}.items():
                title = self._titled(number, name)
                named[title] = replace(row, name=title)
        return sorted(named.values(), key=lambda row: not row.name.startswith(f"{KIND}.prompt"))

    def _start(self, number: int, nudge: torch.Generator | None = None) -> Start:
        """A draw before the first block, of its picture or else of its stored target.

        Args:
            number: of the draw.
            nudge: of a `_nudged` target.
        """
        draw, stored = self.bank.index.draws[number], self.stored[number]
        if number in self.pictured:
            return self.source.start(draw)
        model = self.source.model
        target = _nudged(torch.from_numpy(stored[TARGET]), nudge)
        noise = normal_of(draw.seed, NOISE, self._latents)
        told = not (self.plan.window or self._prior(number))
        clean = model.objective.clean(target, noise) if told else None
        start = self.source.enter(draw, noise if clean is None else clean)
        kept = {name: torch.from_numpy(stored[COND + name]) for name in self.unknown}
        return start._replace(cond={**start.cond, **kept})

    def _entry(self, number: int, nudge: torch.Generator | None = None) -> Start:
        """A draw before the first trained block, at its stored entry state."""
        values = map(self.stored[number].get, STATE)
        parts = [None if v is None else _nudged(torch.from_numpy(v), nudge) for v in values]
        assert parts[0] is not None
        return self.starts[number]._replace(state=State(parts[0], parts[1]))

    def _in_doubt(self, number: int, rows: Mapping[str, Difference]) -> bool:
        """Whether entry and target contradict each other, and the picture cannot decide."""
        return not rows[ENTRY].passed and number not in self.pictured

    def _later(
        self, numbers: Sequence[int], from_entry: bool = False
    ) -> dict[int, dict[str, Difference]]:
        """Differences of states and residuals, or of residuals by the stored entry, of draws."""
        begun = [self._entry(n) if from_entry else self.starts[n] for n in numbers]
        found = {}
        for number, tensors in zip(numbers, self._through(begun, from_entry), strict=True):
            kinds = RESIDUALS if from_entry else (*STATE, *RESIDUALS)
            if self.plan.surroundings:  # taken on the way
                kinds += (COND,)
            kinds += (TARGET,) if self._prior(number) else ()
            rows = self._rows(number, tensors, kinds)
            if not all(row.passed for row in rows.values()):
                rows = self._allowed(number, rows, tensors, from_entry)
            prefix = "entry to " if from_entry else ""
            found[number] = {prefix + name: row for name, row in rows.items()}
        return found

    def _allowed(
        self,
        number: int,
        rows: dict[str, Difference],
        tensors: Mapping[str, np.ndarray],
        from_entry: bool,
    ) -> dict[str, Difference]:
        """Rows with the tolerances that rounding makes necessary at this draw.

        A float16 bank knows the target (or the entry) but for its rounding. At some draws the model
        makes more of that than the tolerance. So the draw is run again from other roundings, and
        `SAFETY` times what that changes is allowed.
        """
        if self.bank.index.dtype != "float16" or number in self.pictured:
            return rows
        begin = self._entry if from_entry else self._start
        nudge = torch.Generator().manual_seed(number)
        others = self._through([begin(number, nudge) for _ in range(NUDGES)], from_entry)
        allowed = {}
        for name, row in rows.items():
            moved = [differences({KIND: tensors[name]}, {KIND: o[name]}, {KIND: 0}) for o in others]
            most = SAFETY * max(one.relative for (one,) in moved)
            limit = row.tolerance if row.passed else max(row.tolerance, most)
            allowed[name] = replace(row, tolerance=limit)
        return allowed

    def _through(self, begun: Sequence[Start], from_entry: bool) -> list[dict[str, np.ndarray]]:
        """The tensors of draws, block by block."""
        if not begun:
            return []
        first = self.plan.head_skip if from_entry else 0
        kept = passed(self.plan, self.checkpoint, begun, _quiet, first)
        tensors = partial(tensors_of, self.plan, self.source, self.checkpoint.names)
        return list(map(tensors, begun, kept))

    def _early(self, number: int) -> dict[str, Difference]:
        """Differences of what is known before the first block: target, conditioning, weight."""
        start = self.starts[number]
        names: tuple[str, ...] = (COND, *([] if number in self.unmasked else [WEIGHT, WEIGHT_MASK]))
        blank = torch.zeros(1)
        known = self.source.model.objective.clean(blank, blank) is None
        if (known or number in self.pictured) and not self._prior(number):
            names = (TARGET, *names)  # otherwise the latents are made of it
        state = start.state
        cond = self.plan.reads(self.checkpoint.names, start.cond)
        batch = as_batch(state, state.image, cond, start.target, start.weight)
        arrays = {name: value.numpy() for name, value in batch.items()}
        if start.window:
            arrays = start.window.cut(arrays, self.plan.placed(self.source.model.family))
        unknown = {COND + name for name in self.unknown}
        known = {name: value for name, value in arrays.items() if name not in unknown}
        return self._rows(number, known, names)

    def _rows(
        self, number: int, tensors: Mapping[str, np.ndarray], kinds: Sequence[str]
    ) -> dict[str, Difference]:
        """Differences of a draw's tensors by name, in the order of ``kinds``.

        Args:
            number: of the draw.
            tensors: recomputed.
            kinds: what is compared: beginnings of names up to the first dot.
        """
        half = self.bank.index.dtype == "float16"
        rows = {}
        for name in sorted(tensors, key=lambda name: _place(name, kinds)):
            if _place(name, kinds) < len(kinds):
                width = "float16" if half and is_halved(name) else "float32"
                one = {KIND: tensors[name]}
                limit = {KIND: TOLERANCES[width]}
                (rows[name],) = differences(one, {KIND: self.stored[number][name]}, limit)
        return rows

    def _titled(self, number: int, name: str) -> str:
        """A tensor's name in a certificate: "bank.draw 3.entry"."""
        if name.removeprefix(COND) in self.plan.per_prompt(self.source.model.family):
            return f"{KIND}.prompt {self.bank.index.draws[number].prompt}.{name}"
        return f"{KIND}.draw {number}.{name}"

    # ------------------------------------------------------------ in words

    def recomputed(self) -> list[str]:
        """What was recomputed and from what, as lines for people."""
        ways = {
            "from their pictures, all of": self.pictured,
            "from seed and target, conditioning, entry state and residuals of": [
                n for n in self.whole if n not in self.pictured
            ],
            "from their seeds, conditioning of"
            if self.plan.window
            else "from the stored entry state, residuals of": [
                n for n in self.numbers if n not in self.whole
            ],
        }
        lines = [f"{way} draws {_listed(numbers)}" for way, numbers in ways.items() if numbers]
        index = self.bank.index
        prompts = {index.draws[number].prompt for number in self.numbers}
        if self.text:
            lines.append(f"{len(prompts)} of {len(index.prompts)} prompts by the text encoder")
        lines.append("from the plan: seed, noise level, place, image and crop of every draw")
        return lines

    def out_of_reach(self) -> list[str]:
        """What could not be recomputed, as lines for people."""
        index = self.bank.index
        lines = [f"the tensors of {len(index.draws) - len(self.numbers)} other draws"]
        if blind := [n for n in self.numbers if n not in self.pictured]:
            lines.append(f"whether draws {_listed(blind)} are of the pictures listed (--images)")
        if self.unmasked:
            lines.append(
                f"the masks of draws {_listed(self.unmasked)}, whose files are not at hand"
            )
        if rest := [n for n in self.numbers if n not in self.whole]:
            lines.append(
                f"whether the entry states of draws {_listed(rest)} follow from their seed"
            )
        if self.plan.window and rest:
            lines.append(f"the targets and residuals of draws {_listed(rest)}, which are windows")
        tail = self.plan.window or (self.plan.tail_skip and self.plan.tail == STORED)
        if rest and not tail and not self.plan.inner_skips:
            lines.append("those entry states at all: no residual is stored that follows from them")
        return lines


def _place(name: str, kinds: Sequence[str]) -> int:
    """Place of a tensor's kind among ``kinds``; their number if it is of none."""
    kind = COND if name.startswith(COND) else name.partition(".")[0]
    return kinds.index(kind) if kind in kinds else len(kinds)


def _nudged(value: torch.Tensor, nudge: torch.Generator | None) -> torch.Tensor:
    """A tensor as another rounding to float16 might have left it."""
    if nudge is None:
        return value
    signs = torch.randint(0, 2, value.shape, generator=nudge) * 2 - 1
    return value * (1 + FLOAT16_ROUNDING * signs)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _quiet(_: float) -> None:
    """The progress of a few draws is not shown."""
