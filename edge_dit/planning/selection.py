"""Which blocks to skip: a measurement of every head and tail, and its file (docs/method.md, Eq. 2).

    (n*, m*) = argmin over n + m = k of head[n] + tail[m]

and, where it was measured to be better, of splits that skip a run between trained blocks as well.
`edge_dit.select.selectors` measures. A selection belongs to a model, not to a job; it is looked for

    MODEL/selection.json                                            a model that ships its own
    ${XDG_CACHE_HOME:-~/.cache}/edge-dit/selection/<model hash>.json    where selecting writes it
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    Strict,
    TypeAdapter,
)
from pydantic import model_validator as validator

from edge_dit.contract.names import STORED, Tail
from edge_dit.errors import BadInput
from edge_dit.store.documents import read_document, validated, write_document
from edge_dit.store.files import cache_folder

SCHEMA = 1
NAME = "selection.json"
REMEDY = "select again, or remove it"
Method = Literal["generation", "loss-masked", "loss-frozen"]


class Between(BaseModel):
    """A split with a run skipped between trained blocks, against the best head and tail of as many.

    Attributes:
        head_skip, tail_skip: n and m.
        run: first block of the run, and the one behind its last.
        gain: by how much less it loses, mean over the measured images; losses are of the split as a
            whole, not of its parts in sum.
        error: standard error of the gain over these images.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    head_skip: NonNegativeInt
    tail_skip: NonNegativeInt
    run: Annotated[tuple[PositiveInt, PositiveInt], Strict(False)]  # JSON has lists
    gain: FiniteFloat = 0.0
    error: FiniteFloat = 0.0

    @property
    def skipped(self) -> int:
        """k, blocks in all."""
        return self.head_skip + self.tail_skip + self.run[1] - self.run[0]

    @property
    def better(self) -> bool:
        """Whether it gains more than two standard errors."""
        return self.gain > 2 * self.error

    def in_words(self) -> str:
        """What was measured."""
        return (
            f"skipping blocks {self.run[0]} to {self.run[1] - 1} too loses {self.gain:.2g} ± "
            f"{self.error:.1g} less than the best head and tail of {self.skipped} blocks"
        )


class Selection(BaseModel):
    """What skipping each head and each tail costs, mean over subjects.

    Attributes:
        model_hash: of the model, see `edge_dit.models.model.Model.hash`.
        layers: its transformer blocks, L.
        method: how it was measured, see `edge_dit.select.selectors`.
        embedding: what the pictures were embedded with; empty when losses were measured.
        subjects: names of what the model was tuned to.
        steps: tuning steps for each.
        prompts, seeds: of the pictures; empty when losses were measured.
        draws: pictures, or noised images, behind each number, over all subjects.
        over: what these are: "generated pictures", "held-out images", "training images".
        head: by number n = 0..L of leading blocks that are masked or frozen, a distance in [0, 2]
            or an increase of the loss; head[0] is 0.
        tail: likewise by number m of trailing blocks, whose residual is stored.
        tail_run: likewise where these blocks run, without LoRA; empty where that was not measured.
        seconds: that measuring took.
        between: for every k the best that was measured of splits with a run between trained blocks,
            better or not; empty where none was.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    schema_version: int = SCHEMA
    model_hash: str
    layers: PositiveInt
    method: Method
    embedding: str
    subjects: list[str]
    steps: PositiveInt
    prompts: list[str]
    seeds: list[int]
    draws: PositiveInt
    over: str
    head: list[FiniteFloat]
    tail: list[FiniteFloat]
    seconds: FiniteFloat
    between: list[Between] = []
    tail_run: list[FiniteFloat] = []

    @validator(mode="after")
    def _is_whole(self) -> Self:
        measured = {"head": self.head, "tail": self.tail}
        for name, values in (measured | {"tail_run": self.tail_run or self.tail}).items():
            if len(values) != self.layers + 1:
                raise ValueError(f"{name} has {len(values)} values for {self.layers} blocks")
            if values[0] != 0:
                raise ValueError(f"{name}[0] is {values[0]}, though nothing is skipped there")
        if not self.subjects:
            raise ValueError("no subject was measured")
        for split in self.between:
            first, end = split.run
            if not split.head_skip < first < end < self.layers - split.tail_skip:
                raise ValueError(f"no trained block on a side of the run [{first}, {end}]")
        if len({split.skipped for split in self.between}) < len(self.between):
            raise ValueError("two splits with a run between skip as many blocks")
        return self

    def score(
        self, head_skip: int, tail_skip: int, inner_skips: Sequence[tuple[int, int]] = ()
    ) -> float:
        """head[n] + tail[m] (Eq. 2). With a run between trained blocks: that of the best head and
        tail of as many blocks, less what the run was measured to gain.

        Raises:
            ValueError: the run was not measured.
        """
        if not inner_skips:
            return self.head[head_skip] + self.tail[tail_skip]
        asked = head_skip, tail_skip, *inner_skips
        (found,) = (s for s in self.between if (s.head_skip, s.tail_skip, s.run) == asked)
        return self.score(*self.best(found.skipped)) - found.gain

    def for_tail(self, tail: Tail) -> Selection:
        """What was measured for plans with a kind of tail. Splits with a run between trained blocks
        were compared with a stored tail only.
        """
        if tail == STORED or not self.tail_run:
            return self
        return self.model_copy(update={"tail": self.tail_run, "between": []})

    def splits(self, skipped: int) -> list[tuple[int, int]]:
        """Every (n, m) with n + m = k, ascending in n.

        Args:
            skipped: k, blocks in all; at least one block must be left.
        """
        if not 0 <= skipped < self.layers:
            raise ValueError(f"{skipped} of {self.layers} blocks skipped")
        return [(head, skipped - head) for head in range(skipped + 1)]

    def best(self, skipped: int) -> tuple[int, int]:
        """(n*, m*) for k skipped blocks. Of equal scores the larger n: the state behind a skipped
        head is exact, a tail residual is not (docs/method.md, Eq. 3).
        """
        return min(self.splits(skipped), key=lambda split: (self.score(*split), -split[0]))

    def proposed(self, skipped: int) -> Between | None:
        """The split of k blocks to take instead of `best`, where one was measured to be better."""
        return next((s for s in self.between if s.skipped == skipped and s.better), None)


def read_selection(path: Path) -> Selection:
    """Read a selection.

    Raises:
        BadInput: missing, damaged, or written by a newer schema.
    """
    raw = read_document(path, "a selection of blocks", REMEDY, SCHEMA)
    return validated(path, TypeAdapter(Selection), raw, REMEDY)


def cache_file(model_hash: str) -> Path:
    """Where the selection of a model is kept on this machine."""
    return cache_folder() / "selection" / f"{model_hash}.json"


def write_selection(selection: Selection, path: Path | None = None) -> Path:
    """Write a selection to ``path``, or to where `find_selection` looks; the file's path."""
    path = path or cache_file(selection.model_hash)
    write_document(path, selection.model_dump())
    return path


def find_selection(model: Path, model_hash: str) -> tuple[Selection | None, str]:
    """The selection of a model, the model's own before this machine's, and a line that says where
    it lies - or None, and why none of what was found is used.

    Args:
        model: the diffusers folder.
        model_hash: see `edge_dit.models.model.Model.hash`.
    """
    reasons = []
    for path in (model / NAME, cache_file(model_hash)):
        if not path.is_file():
            continue
        try:
            selection = read_selection(path)
        except BadInput as fault:
            reasons.append(f"{path} is ignored: {fault.found}")
            continue
        if selection.model_hash == model_hash:
            return selection, str(path)
        reasons.append(
            f"{path} is ignored: it is of weights {selection.model_hash[:12]}, the model's are "
            f"{model_hash[:12]}"
        )
    return None, "; ".join(reasons) or "no selection was made for this model"
