"""Predicts what training a public checkpoint takes, from its shapes; no weights are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edge_dit.budget.limits import Limits
from edge_dit.contract.targets import TARGETS
from edge_dit.errors import BadInput, raise_any
from edge_dit.models.public_configs import PublicConfig, public_config
from edge_dit.planning.split import Split, SplitRequest, choose_split, size_faults

if TYPE_CHECKING:
    from edge_dit.budget.footprint import Profile

DRAWS = 256
"""Draws in the bank that a budget of storage counts; a job's default."""


@dataclass(frozen=True)
class PublicRequest:
    """What someone asks about a public checkpoint.

    Attributes:
        name: key of `edge_dit.models.public_configs.CONFIGS` ("flux.1-dev").
        split: which blocks to skip; not together with a budget.
        patch: s_min in pixels; default the paper's, or half the resolution. With a budget its
            upper bound.
        rank: of the LoRA; with a budget its upper bound.
        targets: for a budget to choose from, or their layouts; default all.
    """

    name: str
    split: SplitRequest = field(default_factory=SplitRequest)
    patch: int | None = None
    rank: int = 16
    targets: Sequence[str] = ()

    def public(self) -> tuple[PublicConfig, int]:
        """The checkpoint, and the patch in pixels.

        Raises:
            BadInput: an unknown name, or a patch that does not divide.
        """
        public = public_config(self.name)
        patch = public.patch if self.patch is None else self.patch
        if faults := size_faults({"--patch": patch}, public.size_step):
            raise faults[0]
        return public, patch


def cost_of(request: PublicRequest) -> tuple[dict[str, Any], list[str]]:
    """What the checkpoint takes with some blocks skipped, compared with full LoRA.

    Returns:
        Facts for JSON, and lines for people.

    Raises:
        BadInput: an unknown name, a patch that does not divide, or no block left to train.
    """
    from edge_dit.budget.cost import cost_of_public, table

    public, patch = request.public()
    split = choose_split(public.layers, request.split)
    raise_any("cost", split.faults)
    parameters, columns = cost_of_public(public, split.trained, patch, request.rank)
    summary = _summary(request, public, split, parameters, patch)
    facts = {
        "summary": summary,
        "config": request.name,
        "family": public.family,
        "parameters": parameters,
        "layers": split.layers,
        "head_skip": split.head_skip,
        "tail_skip": split.tail_skip,
        "patch": patch,
        "resolution": public.resolution,
        "text_tokens": public.text_tokens,
        "rank": request.rank,
        "cost": {heading: vars(column) for heading, column in columns.items()},
    }
    return facts, [summary, *table(columns)]


def _summary(
    request: PublicRequest, public: PublicConfig, split: Split, parameters: int, patch: int
) -> str:
    from edge_dit.budget.cost import count_in_words

    return (
        f"{request.name}: {count_in_words(parameters)} parameters in {split.layers} blocks and the "
        f"rest; train blocks {split.trained[0]}..{split.trained[-1]}, patches {patch} px out of "
        f"{public.resolution} px, {public.text_tokens} text tokens, LoRA rank {request.rank}"
    )


def best_within(
    request: PublicRequest, limits: Limits, profile: Profile | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The best plan of the checkpoint within a budget.

    Args:
        request: upper bounds of the search.
        limits: the budget.
        profile: of the device; default this machine, measured for a second.

    Returns:
        Facts for JSON, and lines for people.

    Raises:
        BadInput: an unknown name, a patch that does not divide, a split besides the budget, or no
            plan fits.
    """
    from edge_dit.budget.footprint import calibrated
    from edge_dit.budget.search import Bounds, choose, space_of, variants_of

    if request.split != SplitRequest():
        raise BadInput(
            "--skip-ratio, --head-skip, --tail-skip",
            found="given together with a budget",
            expected="either which blocks to skip, or a budget that decides it",
            remedy="leave one out",
        )
    public, patch = request.public()
    bounds = Bounds(
        s_min=patch,
        s_max=public.resolution,
        multiple=public.multiple,
        text_tokens=public.text_tokens,
        rank=request.rank,
        draws=DRAWS,
        token_step=public.resolved().token_step,
    )
    variants = variants_of(request.targets or list(TARGETS))
    space = space_of(public.resolved(), public.config, bounds, profile or calibrated(), variants)
    choice = choose(space, limits)
    option = choice.best.option
    facts = {
        "config": request.name,
        "layers": space.layers,
        **{key: value for key, value in vars(option).items() if key != "variant"},
        **vars(option.variant),
        "footprint": vars(choice.best.footprint),
        "compared": choice.compared,
        "fitting": choice.fitting,
        "reasons": choice.in_words(),
    }
    return facts, [f"{request.name}, {space.layers} blocks", *choice.in_words()]
