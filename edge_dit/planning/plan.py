"""The plan: which blocks train, at which sizes. plan.json is what every later stage reads."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_dit.contract.adamw import AdamW
from edge_dit.contract.bank import Dtype as BankDtype
from edge_dit.contract.targets import WIDE, Dtype
from edge_dit.errors import BadInput, ManyFaults, require
from edge_dit.models.families import detect, family_of
from edge_dit.pictures.crop import CropRule
from edge_dit.pictures.images import captions, image_files
from edge_dit.planning.job import Job
from edge_dit.planning.selection import Selection, find_selection
from edge_dit.store.documents import parse_json, read_whole
from edge_dit.store.files import sha256

SCHEMA = 1
Natural = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]
HEAD_SHARE = 2 / 3
"""Share of the skipped blocks taken from the front when a job gives only a ratio.

The state entering the trained blocks is exact, the tail residual is not (docs/method.md, Eq. 3).
And of the paper's one-sided ablations skipping the front is by far the milder: DINO 0.6651 against
0.4808 (docs/method.md, Tables 2 and 4). So the front gives more, and both ends give something.
"""


class Plan(BaseModel):
    """Everything the later stages agree on.

    Attributes:
        family: DiT family ("sana").
        model: the diffusers folder.
        model_hash: see `model_hash`.
        layers: transformer blocks of the model.
        head_skip: leading blocks that are not trained (n).
        tail_skip: trailing blocks that are not trained (m).
        inner_skips: runs [first, end) of blocks between trained ones that are not trained either.
        s_min: side of a patch and smallest crop side, pixels.
        s_max: largest crop side, and shorter side of every image, pixels.
        multiple: the autoencoder's downsampling factor times the transformer's patch size, pixels.
        text_tokens: length text is cut to: the longest prompt of the job.
        rank, alpha: of the LoRA; W' = W + alpha / rank B A.
        lora_targets: modules within a block that carry LoRA.
        optimizer: AdamW's hyper-parameters.
        steps: training steps.
        draws: draws in the bank.
        bank_dtype: what the bank stores its large tensors as.
        seed: of everything random.
        targets: what to export.
        layout: of the target that training uses by default; empty for the target's first.
        weights: how the onnx target stores frozen matrices, see `edge_dit.planning.job.Export`.
        recompute: whether the onnx target gets the recomputing layout too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    schema_version: int = SCHEMA
    family: str
    model: Path
    model_hash: str
    layers: Positive
    head_skip: Natural
    tail_skip: Natural
    inner_skips: list[tuple[Natural, Natural]] = []
    s_min: Positive
    s_max: Positive
    multiple: Positive
    text_tokens: Positive
    rank: Positive
    alpha: Annotated[float, Field(gt=0)]
    lora_targets: list[str]
    optimizer: AdamW
    steps: Positive
    draws: Positive
    seed: Natural
    targets: list[str]
    layout: str = ""
    weights: Dtype = WIDE
    recompute: bool = False
    bank_dtype: BankDtype = "float32"

    @property
    def trained(self) -> list[int]:
        """Numbers of the trained blocks, ascending."""
        return trained_blocks(self.layers, self.head_skip, self.tail_skip, self.inner_skips)

    @property
    def crop_rule(self) -> CropRule:
        """How large the crops are that patches are made of."""
        return CropRule(self.s_min, self.s_max, self.multiple)

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns of a patch."""
        side = self.s_min // self.multiple
        return side, side

    def identity(self) -> str:
        """Hash of all that bank and bundle must share to fit together: the model's weights, the
        split, the sizes and the seed - not the LoRA, the optimizer, or where files lie.
        """
        shared = self.model_dump(
            mode="json",
            exclude={
                "model",
                "rank",
                "alpha",
                "lora_targets",
                "optimizer",
                "steps",
                "draws",
                "targets",
                "layout",
                "weights",
                "recompute",
                "bank_dtype",
            },
        )
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()


def trained_blocks(
    layers: int, head_skip: int, tail_skip: int, inner_skips: Sequence[tuple[int, int]] = ()
) -> list[int]:
    """Numbers of the blocks that no skip covers, ascending.

    Args:
        layers: blocks of the model.
        head_skip: leading blocks left out (n).
        tail_skip: trailing blocks left out (m).
        inner_skips: runs [first, end) left out between them.
    """
    inside = {number for first, end in inner_skips for number in range(first, end)}
    return [n for n in range(head_skip, layers - tail_skip) if n not in inside]


def split(layers: int, skip_ratio: float) -> tuple[int, int]:
    """(head_skip, tail_skip) for a share of skipped blocks, `HEAD_SHARE` of them at the front."""
    skipped = round(layers * skip_ratio)
    head = math.ceil(skipped * HEAD_SHARE)
    return head, skipped - head


class Split(NamedTuple):
    """Which blocks are skipped, see `Plan`, and what is wrong with that."""

    head_skip: int
    tail_skip: int
    inner_skips: list[tuple[int, int]]
    faults: list[BadInput]


def choose_split(
    layers: int,
    skip_ratio: float | None,
    head_skip: int | None,
    tail_skip: int | None,
    selection: Selection | None = None,
    inner_skips: Sequence[tuple[int, int]] = (),
) -> Split:
    """The ratio's split (default one half), where the two ends are not given.

    Args:
        layers: blocks of the model.
        skip_ratio: share of them to skip.
        head_skip: overrides the split's n.
        tail_skip: overrides the split's m.
        selection: of the model; it decides where the ratio alone would not, and may propose a run
            between trained blocks where nothing is given.
        inner_skips: runs that are given.
    """
    ratio = 0.5 if skip_ratio is None else skip_ratio
    skipped, inner = round(layers * ratio), list(inner_skips)
    if selection is not None and skipped < layers:
        head, tail = selection.best(skipped)
        better = selection.proposed(skipped)
        if better and head_skip is None and tail_skip is None and not inner:
            head, tail, inner = better.head_skip, better.tail_skip, [better.run]
    else:
        head, tail = split(layers, ratio)
    head = head if head_skip is None else head_skip
    tail = tail if tail_skip is None else tail_skip
    if head + tail < layers:
        return Split(head, tail, inner, [])
    fault = BadInput(
        "plan",
        found=f"head_skip {head} + tail_skip {tail} leave no block to train",
        expected=f"less than the model's {layers} blocks",
        remedy="skip fewer blocks",
    )
    return Split(head, tail, [], [fault])


def make_plan(
    job: Job,
    skip_ratio: float | None = None,
    head_skip: int | None = None,
    tail_skip: int | None = None,
) -> Plan:
    """Plan a job; where it gives a ratio of skipped blocks, which ones follows from the model's
    selection (`edge_dit.planning.selection.find_selection`), if it has one.

    Args:
        job: as read from job.toml.
        skip_ratio: overrides the job's.
        head_skip: overrides the split's n.
        tail_skip: overrides the split's m.

    Raises:
        BadInput: all faults between job, model and images, together.
    """
    family_name = detect(job.model.path)
    require("torch", "reading a model")
    family = family_of(family_name)
    facts = family.facts(job.model.path)
    explicit = head_skip is not None or tail_skip is not None or skip_ratio is not None
    ratio = job.plan.skip_ratio if skip_ratio is None else skip_ratio
    if not explicit:
        head_skip, tail_skip = job.plan.head_skip, job.plan.tail_skip
    digest = model_hash(job.model.path)
    selection, _ = find_selection(job.model.path, digest)
    # A split given by hand overrides the job's, its runs between trained blocks too.
    given = [] if explicit else job.plan.inner_skips
    chosen = choose_split(facts.layers, ratio, head_skip, tail_skip, selection, given)
    head, tail, inner, faults = chosen
    sizes = {"train.patch": job.train.patch, "train.resolution": job.train.resolution}
    faults += size_faults(sizes, facts.multiple)
    from edge_dit.models.checkpoint import meta_model
    from edge_dit.models.subgraph import can_carry_lora, lora_modules

    model = meta_model(family, family.config(job.model.path))
    lora_targets = list(dict.fromkeys(job.train.lora_targets or family.lora_targets))
    known = dict.fromkeys(
        name
        for block in family.blocks(model).values()
        for name, module in block.named_modules()
        if can_carry_lora(module)
    )
    if job.train.lora_targets:
        faults += _target_faults(lora_targets, list(known))
    if not faults:
        faults += _run_faults(inner, head, facts.layers - tail)
    trained = trained_blocks(facts.layers, head, tail, inner)
    if not faults and not lora_modules(family, model, trained, lora_targets):
        faults.append(
            BadInput(
                "train.lora_targets",
                found="none of them is in a trained block, or all feed only its text output",
                expected=f"a module that blocks {trained[0]} to {trained[-1]} train",
                remedy="name other modules, or skip other blocks",
            )
        )
    prompts = captions(image_files(job.data.images), job.data.prompt)
    if faults:
        raise faults[0] if len(faults) == 1 else ManyFaults("job", faults)
    alpha = job.train.alpha if job.train.alpha is not None else float(job.train.rank)
    return Plan(
        family=family_name,
        model=job.model.path,
        model_hash=digest,
        layers=facts.layers,
        head_skip=head,
        tail_skip=tail,
        inner_skips=inner,
        s_min=job.train.patch,
        s_max=job.train.resolution,
        multiple=facts.multiple,
        text_tokens=family.text_tokens(job.model.path, sorted(set(prompts))),
        rank=job.train.rank,
        alpha=alpha,
        lora_targets=lora_targets,
        optimizer=AdamW(lr=job.train.lr),
        steps=job.train.steps,
        draws=job.train.draws,
        seed=job.train.seed,
        targets=list(dict.fromkeys(job.export.targets)),
        weights=job.export.weights,
        recompute=job.export.recompute,
        bank_dtype=job.train.bank,
    )


def size_faults(sizes: dict[str, int], multiple: int) -> list[BadInput]:
    """Sizes in pixels, by where they stand, that are no multiple of a token's side."""
    return [
        BadInput(
            where,
            found=f"{value} pixels",
            expected=f"a multiple of {multiple}, the model's downsampling factor",
            remedy=f"{max(1, value // multiple) * multiple} or {-(-value // multiple) * multiple}",
        )
        for where, value in sizes.items()
        if value % multiple
    ]


def _run_faults(runs: Sequence[tuple[int, int]], first: int, end: int) -> list[BadInput]:
    """Runs that do not lie, one behind the other, between trained blocks."""
    faults, free = [], first + 1
    for start, stop in runs:
        if not free <= start < stop < end:
            faults.append(
                BadInput(
                    "plan.inner_skips",
                    found=f"[{start}, {stop}]",
                    expected=f"ascending runs of blocks [first, end) between trained ones: {free} "
                    f"<= first < end < {end}",
                )
            )
        free = stop + 1
    return faults


def _target_faults(targets: list[str], known: list[str]) -> list[BadInput]:
    return [
        BadInput(
            "train.lora_targets",
            found=f"no module {target!r} in a block",
            expected=f"some of {', '.join(known)}",
            remedy=f"did you mean {' or '.join(near)}?" if near else "",
        )
        for target in targets
        if target not in known
        for near in [difflib.get_close_matches(target, known)]
    ]


def model_hash(model: Path) -> str:
    """SHA-256 over configurations and weights of all that shapes a bank's bytes."""
    digest = hashlib.sha256()
    parts = ("transformer", "vae", "text_encoder*", "tokenizer*", "scheduler")
    for folder in (f for part in parts for f in sorted(model.glob(part))):
        for file in sorted(folder.glob("*")):
            if file.suffix in (".json", ".safetensors"):
                digest.update(f"{folder.name}/{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


def read_plan(path: Path) -> Plan:
    """Read plan.json.

    Raises:
        BadInput: missing, not a plan, or written by a newer schema.
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


def check_model(plan: Plan) -> None:
    """Raise `BadInput` when the model folder is gone or its weights are not those planned for."""
    detect(plan.model)
    if model_hash(plan.model) != plan.model_hash:
        raise BadInput(
            plan.model,
            found="other weights than the plan was made for",
            expected=f"weights with hash {plan.model_hash[:12]}",
            remedy="plan again: edge-dit plan JOB -o plan.json",
        )
