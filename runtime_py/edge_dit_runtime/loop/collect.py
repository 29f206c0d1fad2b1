"""Pictures -> bank, on the device; the same draws, names and digests as a host's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from edge_dit.contract import bank
from edge_dit.contract.bundle import Bundle, open_bundle
from edge_dit.contract.integrity import check_bundle
from edge_dit.errors import BadInput, raise_any
from edge_dit.pictures.dataset import Captioned, SubjectFolder, read_folders
from edge_dit.pictures.draws import BankRequest, bank_index, prompts_of
from edge_dit.pictures.filling import fill
from edge_dit.store.files import StrPath
from edge_dit_runtime.loop.parts import TARGET, Parts
from edge_dit_runtime.loop.shipped import NEEDED, REMEDY, ShippedPrior
from edge_dit_runtime.loop.starts import Starts, planned_of


def collect(
    bundle: StrPath,
    images: StrPath,
    folder: StrPath,
    *,
    prompt: str | None = None,
    recursive: bool = False,
    prior: StrPath | None = None,
) -> bank.Index:
    """Make the bank of a bundle from pictures, or finish one that was stopped.

    Args:
        bundle: exported with the loop's parts.
        images: folder of pictures, with captions as `edge-dit precompute` reads them.
        folder: where the bank goes.
        prompt: caption of pictures without one of their own; default the job's.
        recursive: read sub-folders too.
        prior: a prior's bank, where the bundle's plan has one: its draws are copied.

    Returns:
        The bank's index.

    Raises:
        BadInput: the bundle lacks the loop's parts or a caption, or is damaged; ``folder`` holds
            another bank; pictures cannot be read; or the plan's prior draws are
            not in ``prior``.

    Example:
        >>> index = er.collect("loop_bundle", "images", "device_bank")
        >>> len(index.draws) > 0
        True
    """
    opened = open_bundle(Path(bundle))
    parts = open_parts(opened)
    plan, shipped = planned_of(opened), _shipped(opened, prior)
    pictures = read_pictures(parts, Path(images), prompt, recursive)
    pictures += shipped.pictures(plan.s_max) if shipped else []
    sizes = opened.manifest.shapes("batch").values()
    asked = BankRequest(
        opened.manifest.plan_hash,
        plan.draws,
        plan.seed,
        plan.crop_rule,
        plan.bank_dtype,
        sum(4 * prod(shape) for shape in sizes) * plan.passing_factor,
        plan.prior_share,
    )
    index = bank_index(asked, pictures, parts.objective.level)
    starts = Starts(parts, pictures, dict(enumerate(map(parts.prompt, index.prompts))))
    places = shipped.places(index) if shipped else {}
    maker = partial(_Maker, starts, index, shipped, places)
    fill(Path(folder), index, pictures, starts.shared, maker)
    return index


def _shipped(bundle: Bundle, folder: StrPath | None) -> ShippedPrior | None:
    """The prior draws of a bundle's plan; None if it has none.

    Raises:
        BadInput: they are not given, or given for nothing.
    """
    wanted = bool(planned_of(bundle).prior_share)
    if wanted and folder is None:
        raise BadInput(
            bundle.folder,
            found=NEEDED,
            expected="a prior's bank beside the pictures: --prior",
            remedy=REMEDY,
        )
    if folder is None:
        return None
    if not wanted:
        raise BadInput(
            folder,
            found="a prior's bank",
            expected=f"none: the plan of {bundle.folder} has no [prior]",
            remedy="leave it out, or plan with [prior] and export again",
        )
    return ShippedPrior(Path(folder), bundle.manifest.plan_hash)


def open_parts(bundle: Bundle) -> Parts:
    """The loop's parts of a bundle, its files checked.

    Raises:
        BadInput: it lacks them, or is damaged.
    """
    bundle.facts(TARGET)
    check_bundle(bundle, TARGET)
    return Parts(bundle)


def read_pictures(
    parts: Parts, folder: Path, prompt: str | None, recursive: bool = False
) -> list[Captioned]:
    """The pictures of a folder, each with a caption that the bundle knows.

    Args:
        parts: of the bundle.
        folder: with the pictures.
        prompt: caption of pictures without one of their own; default the job's.
        recursive: read sub-folders too.

    Raises:
        BadInput: pictures cannot be read or have no caption; the bundle lacks captions, all named.
    """
    plan = planned_of(parts.bundle)
    caption = parts.facts.caption if prompt is None else prompt
    subject = SubjectFolder(folder, caption, recursive, **parts.facts.draws.model_dump())
    pictures = read_folders([subject], plan.s_max)
    faults = []
    if not plan.weighted and (odd := [p.name for p in pictures if p.weight != 1]):
        found, expected = f"weights of pictures ({odd[0]}, ...)", "a bundle that takes weights"
        remedy = "give a picture of the job a weight and export again; or remove the column"
        faults.append(BadInput(folder, found=found, expected=expected, remedy=remedy))
    if not plan.masked and (odd := [p.name for p in pictures if p.mask is not None]):
        found, expected = f"masks of pictures ({odd[0]}, ...)", "a bundle that takes masks"
        remedy = "give a picture of the job a mask and export again; or remove the masks"
        faults.append(BadInput(folder, found=found, expected=expected, remedy=remedy))
    for text in prompts_of(pictures):
        try:
            parts.prompt(text)
        except BadInput as fault:
            faults.append(fault)
    raise_any(folder, faults)
    return pictures


@dataclass(frozen=True)
class _Maker:
    """Makes draws with the bundle's graphs, see `edge_dit.pictures.filling.Maker`. Prior draws are
    copied, from their ``places`` in the shipped bank.
    """

    starts: Starts
    index: bank.Index
    shipped: ShippedPrior | None
    places: Mapping[int, int]

    def per_prompt(self) -> Sequence[Mapping[str, np.ndarray]]:
        return self.starts.per_prompt()

    def draws(
        self, numbers: Sequence[int], advance: Callable[..., None]
    ) -> Iterator[Mapping[str, np.ndarray]]:
        own = [number for number in numbers if number not in self.places]
        drawn = [self.index.draws[number] for number in own]
        begun = [self.starts.enter(draw, self.starts.encode(draw)) for draw in drawn]
        made = dict(zip(own, self.starts.tensors(begun, advance), strict=True))
        advance(len(numbers) - len(own))
        return (made[number] if number in made else self._copied(number) for number in numbers)

    def _copied(self, number: int) -> Mapping[str, np.ndarray]:
        assert self.shipped is not None
        return self.shipped[self.places[number]]
