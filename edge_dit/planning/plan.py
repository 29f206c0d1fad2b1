"""The plan: which blocks train, and at which sizes. Every later stage reads it from plan.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

from edge_dit.contract.adamw import AdamW, Schedule
from edge_dit.contract.bank import Dtype as BankDtype
from edge_dit.contract.loop import TILE
from edge_dit.contract.names import AT_HEAD, STORED, T, Tail, read_in
from edge_dit.contract.split import trained_blocks
from edge_dit.contract.targets import WIDE, Compute, Dtype, stored_as
from edge_dit.errors import BadInput
from edge_dit.models.model import Model, open_model
from edge_dit.models.whereabouts import known_folders, remember
from edge_dit.pictures.sizes import PatchSizes
from edge_dit.store.documents import parse_json, read_whole
from edge_dit.store.files import write_atomic

if TYPE_CHECKING:
    from edge_dit.models.families.family import Family

SCHEMA = 1
LOOP_TARGET = "onnx"
"""The target that has the loop's parts."""
Natural = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]


class Plan(PatchSizes):
    """Everything that the later stages agree on, with its sizes.

    Attributes:
        family: name of the model's family ("sana").
        model: the diffusers folder on this machine, if it is known; it is not written to files,
            which people share.
        model_name: bare name of that folder, or of a single file, or the hub id it came from.
        model_revision: commit, if it came from the hub.
        model_variant: of its weights, see `edge_dit.models.model.open_model`.
        model_hash: `edge_dit.models.model.Model.hash` of that folder.
        layers: transformer blocks of the model.
        head_skip: number of leading blocks that are not trained (n).
        tail_skip: number of trailing blocks that are not trained (m).
        inner_skips: runs [first, end) of blocks between trained ones that are not trained either.
        tail: what takes the place of the trailing blocks that are not trained.
        text_tokens: length of encoded text: that of the job's longest prompt.
        surroundings: whether blocks that run are given what is around a window
            (`edge_dit.models.families.parts.surroundings`).
        rank, alpha: of the LoRA; W' = W + alpha / rank B A.
        lora_targets: modules within a block that carry LoRA.
        optimizer: AdamW's hyper-parameters.
        steps: number of training steps.
        draws: number of draws in the bank.
        bank_dtype: dtype of the bank's large tensors.
        seed: of everything random.
        schedule, warmup: of the learning rate, see `edge_dit.contract.adamw.learning_rate`.
        accumulate, ema: draws of an update, and decay of the adapter's average; see
            `edge_dit_runtime.sessions.smoothed`.
        preview_every: steps between pictures painted while training; 0 for none.
        prior_share: share of the draws that are prior draws.
        weighted: whether the draws' losses are weighed by their pictures' weights.
        masked: whether they are by their pictures' masks too.
        targets: to export.
        layout: that training uses by default; empty for the target's first one.
        weights: dtype of frozen matrices in the onnx target (`edge_dit.planning.job.Export`).
        compute: how products with them are computed (`edge_dit.planning.job.Export`).
        recompute: whether the onnx target also gets the recomputing layout.
        loop: whether the onnx target also gets the loop's parts (`edge_dit.contract.loop`).
        asked: the job's keys, see `edge_dit.planning.job.Job.asked`; empty if there was no job.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    schema_version: int = SCHEMA
    family: str
    model: Annotated[Path | None, Field(exclude=True)] = None
    model_name: str
    model_revision: str | None = None
    model_variant: str | None = None
    model_hash: str
    layers: Positive
    head_skip: Natural
    tail_skip: Natural
    inner_skips: list[tuple[Natural, Natural]] = Field(default_factory=list)
    tail: Tail = STORED
    text_tokens: Positive
    surroundings: bool = False
    rank: Positive
    alpha: Annotated[float, Field(gt=0)]
    lora_targets: list[str]
    optimizer: AdamW
    steps: Positive
    draws: Positive
    seed: Natural
    schedule: Schedule = "decay"
    warmup: Natural = 0
    accumulate: Positive = 1
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    preview_every: Natural = 0
    prior_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weighted: bool = False
    masked: bool = False
    targets: list[str]
    layout: str = ""
    weights: Dtype = WIDE
    compute: Compute = WIDE
    recompute: bool = False
    bank_dtype: BankDtype = "float32"
    loop: bool = False
    asked: dict[str, Any] = Field(default_factory=dict)

    @property
    def kept(self) -> int:
        """Copies of the LoRA in float32 that a run keeps beside the optimizer: a sum of gradients,
        an average of the adapter.
        """
        return (self.accumulate > 1) + (self.ema > 0)

    @property
    def trained(self) -> list[int]:
        """Numbers of the trained blocks, ascending."""
        return trained_blocks(self.layers, self.head_skip, self.tail_skip, self.inner_skips)

    @property
    def running(self) -> list[int]:
        """Numbers of the blocks that a training step runs, ascending: the trained ones, and the
        tail unless its residual is stored.
        """
        after = [] if self.tail == STORED else range(self.layers - self.tail_skip, self.layers)
        return [*self.trained, *after]

    def reads(self, blocks: Sequence[str], cond: Mapping[str, T]) -> dict[str, T]:
        """What a training step reads of a model's conditioning.

        Args:
            blocks: names of all blocks of the model, in order.
            cond: by full names.
        """
        return read_in([*(blocks[number] for number in self.running), AT_HEAD], cond)

    def placed(self, family: Family) -> tuple[str, ...]:
        """Conditioning with a row for each token, which differs from window to window."""
        return (family.placed or ()) if self.window else ()

    def per_prompt(self, family: Family) -> tuple[str, ...]:
        """Conditioning that a bank stores once per prompt."""
        return family.by_prompt(self.window)

    @property
    def tile(self) -> int | None:
        """Side in pixels of the tiles that a crop is encoded in; None if it is encoded whole. A
        device encodes in tiles, so the host does where the device may too.
        """
        return TILE if self.loop and self.passing > TILE else None

    @property
    def held(self) -> str:
        """How the frozen matrices are stored that a bank is made with. A device makes it with those
        that it holds, so the host does where the device may too.
        """
        return stored_as(self.weights, self.compute) if self.loop else WIDE

    def shared(self) -> dict[str, Any]:
        """What a bundle says of its plan: all but the job's own words, such as its prompt."""
        return self.model_dump(mode="json", exclude={"asked"})

    def identity(self) -> str:
        """SHA-256, hexadecimal, of everything that a bank and a bundle must share to fit together.

        That is the model's weights, the split, the sizes and the seed; not the LoRA, the optimizer,
        or where files lie.
        """
        shared = self.model_dump(
            mode="json",
            exclude={
                "model_name",
                "model_revision",
                "asked",
                "rank",
                "alpha",
                "lora_targets",
                "optimizer",
                "steps",
                "draws",
                "targets",
                "layout",
                "weights",
                "compute",
                "recompute",
                "bank_dtype",
                "loop",
                "preview_every",
                "schedule",
                "warmup",
                "accumulate",
                "ema",
            },
        )
        if self.held != WIDE:
            shared["held"] = self.held
        if self.tile:  # the pictures of a bank went through the autoencoder in another way
            shared["tile"] = self.tile
        # Plans from before there were such choices keep their identity.
        plain = {
            "tail": STORED,
            "prior_share": 0.0,
            "weighted": False,
            "masked": False,
            "window": False,
            "surroundings": False,
        }
        shared = {k: v for k, v in shared.items() if k not in plain or v != plain[k]}
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()


def loop_faults(loop: bool, targets: Sequence[str], surroundings: bool = False) -> list[BadInput]:
    """Faults if the loop's parts are wanted, and no target has them or they cannot make the bank.

    Args:
        loop: whether they are wanted.
        targets: to export.
        surroundings: of the plan.
    """
    faults = []
    if loop and LOOP_TARGET not in targets:
        faults.append(
            BadInput(
                "export.loop",
                found=f"the loop's parts with target {', '.join(targets)}",
                expected=f"{LOOP_TARGET} among the targets: its streamed layout runs the loop",
                remedy=f"add {LOOP_TARGET} to [export] targets, or remove loop",
            )
        )
    if loop and surroundings:
        faults.append(
            BadInput(
                "export.loop",
                found="the loop's parts with [train] surroundings",
                expected="a bank that the host makes: a device cannot make one with them yet",
                remedy="remove loop, or surroundings",
            )
        )
    return faults


def read_plan(path: Path) -> Plan:
    """Read plan.json.

    Raises:
        BadInput: it is missing, not a plan, or of a newer schema.
    """
    remedy = "make it: edge-dit plan JOB -o plan.json"
    try:
        raw: Any = parse_json(read_whole(path))
    except FileNotFoundError:
        raise BadInput(path, found="no such file", expected="a plan", remedy=remedy) from None
    except (OSError, ValueError) as error:
        raise BadInput(path, found=f"unreadable ({error})", remedy=remedy) from None
    if isinstance(raw, dict) and isinstance(v := raw.get("schema_version"), int) and v > SCHEMA:
        raise BadInput(
            path, found=f"schema version {v}", expected=f"<= {SCHEMA}", remedy="upgrade edge-dit"
        )
    try:
        return Plan.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "content"
        raise BadInput(path, found=f"{place}: {first['msg']}", remedy=remedy) from None


def write_plan(plan: Plan, path: Path) -> None:
    """Write plan.json, whole or not at all."""
    write_atomic(path, plan.model_dump_json(indent=2) + "\n")


def model_of(plan: Plan, check: bool = True) -> Model:
    """Open the model of a plan (imports torch).

    It lies where the plan says or, if that was read from a file, where a model of the same hash was
    last used on this machine.

    Args:
        plan: of the model.
        check: compare the model's weights with those the plan was made for; reads all of them.

    Raises:
        BadInput: the folder is not known or gone, or its weights are not those the plan was made
            for.
    """
    if plan.model is not None:
        return _opened(plan, plan.model, check)
    *newer, oldest = known_folders(plan.model_name, plan.model_hash)
    for folder in newer:
        with suppress(BadInput):  # another model may lie there now
            return _opened(plan, folder, check)
    return _opened(plan, oldest, check)


def _opened(plan: Plan, folder: Path, check: bool) -> Model:
    model = open_model(folder, plan.model_variant)
    if check and model.hash != plan.model_hash:
        raise BadInput(
            model.folder,
            found="other weights than the plan was made for",
            expected=f"weights with hash {plan.model_hash[:12]}",
            remedy="plan again: edge-dit plan JOB -o plan.json",
        )
    if check:
        remember(folder, plan.model_hash)
    return model
