"""job.toml: what a user asks for. All faults of a file are reported together."""

from __future__ import annotations

import re
import reprlib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from edge_dit.contract.adamw import Schedule
from edge_dit.contract.bundle import TARGETS
from edge_dit.contract.names import Tail
from edge_dit.errors import BadInput, raise_any
from edge_dit.models.source import BESIDE, settle
from edge_dit.pictures.captions import MOST, clean
from edge_dit.pictures.dataset import SubjectFolder
from edge_dit.store.documents import read_whole
from edge_dit.store.remote import path_from
from edge_dit.text import seconds_of, utf8

SIZE = re.compile(r"\s*\d{1,12}(\.\d{1,12})?\s*[kmgt]i?b\s*", re.IGNORECASE | re.ASCII)
"""A size with its unit. `ByteSize` alone also takes "3" for three bytes and "3Gbit" for bits, and
reads only the beginning of "3 GiB free".
"""
_SIZES = TypeAdapter(ByteSize)


def bytes_of(text: object) -> ByteSize:
    """Bytes of "3GiB", "200 MiB", "1.5GB".

    Raises:
        ValueError: something else, or zero.
    """
    if SIZE.fullmatch(str(text)) and (found := _SIZES.validate_python(str(text))):
        return found
    raise ValueError("a size such as 3GiB, 200MiB or 1.5GB")


Positive = Annotated[int, Field(ge=1)]
Size = Annotated[ByteSize, BeforeValidator(bytes_of)]
Seconds = Annotated[float, BeforeValidator(seconds_of)]
BACKSLASH = re.compile(r"=\s*\"[^\"\n]*\\")
"""A value in double quotes with a backslash in it."""
WINDOWS_PATHS = (
    r"a backslash in double quotes begins an escape: put a Windows path in single quotes, "
    r"'C:\pictures', or write it with /"
)
MODELS = ("path", "config", "use_on")
"""Keys of [model] that name a model."""
DOTS = 1000
"""Dots in a job file at most: tomllib keeps every prefix of a dotted key, so that a key of 20,000
parts, 40 KB, took 1.6 GB and 10 s.
"""


def _texts(value: object) -> list[str]:
    """A text, or a list of them, as a list.

    Raises:
        ValueError: something else, or empty.
    """
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and texts and all(isinstance(t, str) and clean(t) for t in texts):
        return texts
    raise ValueError("a prompt, or a list of prompts")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Section):
    """[model]: what is personalised."""

    path: Annotated[
        Path | str,
        Field(
            description="Folder of a pipeline in diffusers format, or of the hub's cache "
            "(`models--org--name`), or a .safetensors file, relative to the job; or a hub id "
            "(`org/name`). See [docs/models.md](models.md)."
        ),
    ]
    """`read_job` makes a folder or file an absolute `Path`; text is a hub id."""
    revision: Annotated[
        str | None,
        Field(min_length=1, description="Branch, tag or commit of the hub; default: main."),
    ] = None
    variant: Annotated[
        str | None,
        Field(
            pattern=r"^[A-Za-z0-9_]+$",
            description='Which weights, where the model has several: `"fp16"` takes '
            "`model.fp16.safetensors`.",
        ),
    ] = None
    config: Annotated[
        Path | str | None,
        Field(
            description="Of a .safetensors file only: diffusers folder or hub id with its "
            "configurations, tokenizers and missing parts; default: the repository that diffusers "
            "names for such a file."
        ),
    ] = None
    use_on: Annotated[
        Path | str | None,
        Field(
            description="Folder or hub id of a distilled checkpoint that the adapter is used on; "
            "`path`, which may then be called `train_on`, is its base. See "
            "[docs/recipes.md](recipes.md)."
        ),
    ] = None


class FurtherSubject(_Section):
    """[[data.subjects]]: further subjects, each with a folder of its own. `recursive`,
    `caption_lines`, `caption_dropout` and `folder_repeats` are those of [data].
    """

    images: Annotated[Path, Field(description="Folder of its pictures, relative to the job.")]
    prompt: Annotated[
        str | None, Field(description="Caption of every picture that has none of its own.")
    ] = None
    trigger: Annotated[
        str | None,
        Field(min_length=1, description="Words put before each caption that lacks them."),
    ] = None
    repeats: Annotated[
        int, Field(ge=1, le=MOST, description="Turns that each of its pictures has.")
    ] = 1
    weight: Annotated[
        float, Field(gt=0, le=MOST, description="Weight of the loss of each of its draws.")
    ] = 1.0


class Data(_Section):
    """[data]: what it is taught."""

    images: Annotated[
        Path,
        Field(
            description="Folder of training pictures, relative to the job. Their captions are text "
            "files of their names (`toy-0.png`, `toy-0.txt`), or lines of metadata.jsonl or "
            "metadata.csv: docs/inputs.md."
        ),
    ]
    prompt: Annotated[
        str | None, Field(description="Caption of every picture that has none of its own.")
    ] = None
    recursive: Annotated[bool, Field(description="Read sub-folders of `images` too.")] = False
    trigger: Annotated[
        str | None,
        Field(min_length=1, description="Words put before each caption that lacks them."),
    ] = None
    caption_lines: Annotated[
        bool,
        Field(
            description="Each line of a caption is a caption of its own; every draw takes one of "
            "them. Default: all lines are one caption."
        ),
    ] = False
    caption_dropout: Annotated[
        float,
        Field(ge=0, lt=1, description="Share of the draws that have the empty prompt instead."),
    ] = 0.0
    folder_repeats: Annotated[
        bool,
        Field(
            description="Pictures in a sub-folder named `10_toy` are drawn ten times as often, as "
            "kohya's tools do. Needs `recursive`."
        ),
    ] = False
    alpha_masks: Annotated[
        bool,
        Field(
            description="The pictures' alpha channels are loss masks: what is transparent is not "
            "learned. Without it, `toy.mask.png` beside `toy.jpg` is its mask, if it is there: "
            "white is learned, black is not, gray in part."
        ),
    ] = False
    repeats: Annotated[
        int,
        Field(
            ge=1,
            le=MOST,
            description="Turns that each picture of `images` has while a picture of another "
            "subject has one. A column `repeats` of metadata.jsonl or metadata.csv multiplies it "
            "for one picture.",
        ),
    ] = 1
    weight: Annotated[
        float,
        Field(
            gt=0,
            le=MOST,
            description="Weight of the loss of each draw of `images`. A column `weight` of "
            "metadata.jsonl or metadata.csv multiplies it for one picture.",
        ),
    ] = 1.0
    subjects: Annotated[
        list[FurtherSubject],
        Field(description="Further subjects, as tables `[[data.subjects]]`; see below."),
    ] = []

    def folders(self) -> list[SubjectFolder]:
        """Every subject's folder, and what becomes of its pictures."""
        shared = {
            "recursive": self.recursive,
            "caption_lines": self.caption_lines,
            "caption_dropout": self.caption_dropout,
            "folder_repeats": self.folder_repeats,
            "alpha_masks": self.alpha_masks,
        }
        return [
            SubjectFolder(
                images=subject.images,
                prompt=subject.prompt,
                trigger=subject.trigger,
                repeats=subject.repeats,
                weight=subject.weight,
                **shared,
            )
            for subject in (self, *self.subjects)
        ]


class Prior(_Section):
    """[prior]: what the base model does with other prompts, kept. A share of the draws have these
    prompts, and the base model's own prediction as their target
    ([docs/method.md](method.md#prior-preservation)).
    """

    prompt: Annotated[
        list[str],
        BeforeValidator(_texts),
        Field(
            description="**Required** in this section. What is kept: the class of the subject "
            '(`"a toy"`), or several prompts in a list.',
        ),
    ] = []
    images: Annotated[
        int,
        Field(
            ge=0,
            le=10_000,
            description="Pictures that the base model draws of these prompts, for the prior's "
            "draws. 0: these are of the training pictures.",
        ),
    ] = 0
    share: Annotated[
        float,
        Field(gt=0, le=0.9, description="Share of the draws that keep it."),
    ] = 0.25
    weight: Annotated[
        float, Field(gt=0, le=MOST, description="Weight of the loss of these draws.")
    ] = 1.0


class PlanOptions(_Section):
    """[plan]: which blocks are skipped; or a budget that decides it."""

    skip_ratio: Annotated[
        float, Field(ge=0, lt=1, description="Share of blocks to skip. Not beside a budget.")
    ] = 0.5
    head_skip: Annotated[
        int | None, Field(ge=0, description="Leading blocks to skip (n); default: chosen.")
    ] = None
    tail_skip: Annotated[
        int | None, Field(ge=0, description="Trailing blocks to skip (m); default: chosen.")
    ] = None
    inner_skips: Annotated[
        list[tuple[int, int]],
        Field(
            description="Runs [first, end) of blocks to skip between trained ones. Not beside a "
            "budget."
        ),
    ] = []
    tail: Annotated[
        Tail | None,
        Field(
            description="What takes the place of the trailing blocks that are skipped: the base "
            "model's residual from the bank (`stored`, the paper's way); the blocks themselves, "
            "their residual counted as a constant (`fresh`); or the blocks and the gradient "
            "through them (`through`). Default: `stored`, or what a budget allows. "
            "[docs/method.md](method.md#three-ways-to-skip-a-tail-block) compares them."
        ),
    ] = None
    ram: Annotated[
        Size | None,
        Field(description="Budget of memory: a training process at its peak, pages of files too."),
    ] = None
    flash: Annotated[Size | None, Field(description="Budget of storage: bundle and bank.")] = None
    step_time: Annotated[Seconds | None, Field(description="Budget of time: one step.")] = None


class Train(_Section):
    """[train]: sizes, LoRA and optimizer."""

    resolution: Annotated[
        Positive,
        Field(
            description="s_max of Eq. 1, pixels: largest crop, and the side that images are "
            "resized to. The side the model draws at."
        ),
    ]
    patch: Annotated[
        Positive,
        Field(
            description="s_min of Eq. 1, pixels: what the device trains on. At most `resolution`; "
            "both are multiples of the pixels on a token's side."
        ),
    ]
    window: Annotated[
        bool,
        Field(
            description="Patches are windows: whole pictures pass the frozen blocks, and the "
            "trained ones see `patch` of their states, at its own scale and place. Otherwise they "
            "are the crops of Eq. 1, resized. A step costs the same, and the bank takes longer to "
            "make. [docs/method.md](method.md#windows) compares both."
        ),
    ] = False
    surroundings: Annotated[
        bool,
        Field(
            description="Blocks are given what the base model has around a window: what their "
            "attention and convolutions would read of the rest of the picture. Trains better, and "
            "a draw takes more of the bank. With `window`, of SANA and FLUX; without `[export] "
            "loop`. [docs/method.md](method.md#what-is-around-a-window) has the figures."
        ),
    ] = False
    rank: Annotated[Positive, Field(description="Rank r of the LoRA.")] = 16
    alpha: Annotated[
        float | None, Field(gt=0, description="The LoRA's scale is alpha / rank; default: rank.")
    ] = None
    lora_targets: Annotated[
        list[str] | None,
        Field(
            min_length=1,
            description="Modules within a block that carry LoRA: linear layers and 1x1 "
            "convolutions; default: the family's own.",
        ),
    ] = None
    lr: Annotated[
        float,
        Field(
            gt=0,
            description="Learning rate of AdamW; `schedule` is its course.",
        ),
    ] = 1e-4
    beta1: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="AdamW's beta1, the share of the past in its first moment. At 0 nothing of "
            "it is kept: half of the optimizer's state (docs/method.md says what it costs).",
        ),
    ] = 0.9
    loraplus_lr_ratio: Annotated[
        float,
        Field(
            gt=0,
            le=1000,
            description="Learning rate of LoRA B over that of A (LoRA+, arXiv 2402.12354, as in "
            "peft); 1 is plain LoRA. `lr` is A's.",
        ),
    ] = 1.0
    schedule: Annotated[
        Schedule,
        Field(
            description="`decay`: constant, then falling towards 0 over the last 40 % of the "
            "steps. `constant`; `linear`, falling over all steps; `cosine`."
        ),
    ] = "decay"
    warmup: Annotated[
        int, Field(ge=0, description="First steps, over which the learning rate rises to `lr`.")
    ] = 0
    accumulate: Annotated[
        int,
        Field(
            ge=1,
            le=10_000,
            description="Draws of an update, which takes the mean of their gradients. `steps` "
            "counts draws, so it is a multiple of this; `lr` follows its course at every draw.",
        ),
    ] = 1
    ema: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="Decay of the adapter's exponential moving average, say 0.99, which is "
            "then the adapter that a run gives; 0 for none. After update n it is at most "
            "(1 + n) / (10 + n), as in diffusers' EMAModel.",
        ),
    ] = 0.0
    rank_stabilized: Annotated[
        bool,
        Field(
            description="The LoRA's scale is alpha / sqrt(rank), as rsLoRA's (arXiv 2312.03732), "
            "so that higher ranks learn as fast."
        ),
    ] = False
    steps: Annotated[Positive, Field(description="Training steps, one draw each.")] = 500
    draws: Annotated[Positive, Field(description="Draws in the bank.")] = 256
    preview_every: Annotated[
        int,
        Field(
            ge=0,
            description="Steps between pictures of `[export] prompts` that are painted while it "
            "trains; 0 for none. The device paints them with `[export] loop`; without, `edge-dit "
            "run` does, with the base model.",
        ),
    ] = 0
    bank: Annotated[
        Literal["float32", "float16"],
        Field(description="How the bank stores its large tensors; float16 takes half the bytes."),
    ] = "float32"
    seed: Annotated[int, Field(ge=0, lt=2**31, description="Seed of everything random.")] = 0


class Export(_Section):
    """[export]: what is written for the device."""

    targets: Annotated[
        list[str], Field(min_length=1, description=f"Some of {', '.join(TARGETS)}.")
    ] = list(TARGETS)
    weights: Annotated[
        Literal["float32", "float16", "int8", "int4"],
        Field(
            description="How the onnx target stores frozen matrices: float32 for all its layouts; "
            "float16, int8 with a scale per output channel, or int4 with one per 32 inputs, for "
            "the streamed one only, unless `compute` is int8. In int4 are only the blocks' "
            "matrices; the others are in int8."
        ),
    ] = "float32"
    compute: Annotated[
        Literal["float32", "int8", "int8-rotated"],
        Field(
            description="How a training step of the onnx and executorch targets multiplies with "
            "the blocks' frozen matrices: in float32; or in int8, in all layouts, which takes "
            'about half of the time; or in int8 after channels were mixed ("int8-rotated"), which '
            "costs time and helps where single channels stand out. Both need "
            '`weights = "int8"`.'
        ),
    ] = "float32"
    recompute: Annotated[
        bool,
        Field(
            description="Write the onnx target's recompute layout too: one graph that computes "
            "each block again for its gradients."
        ),
    ] = False
    loop: Annotated[
        bool,
        Field(
            description="Write the loop's parts too, into the onnx target: the device then makes "
            "its own draws of pictures, and paints. They hold all of the model but its text "
            "encoders."
        ),
    ] = False
    prompts: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        Field(
            description="Prompts to paint. With `loop` the bundle holds them encoded, besides the "
            "pictures' captions."
        ),
    ] = []
    negative_prompt: Annotated[
        str | None,
        Field(
            description="With `loop`: what paintings are guided away from; default: the pipeline's "
            "own, nothing. Previews that the base model's pipeline paints do not take it."
        ),
    ] = None


class Job(_Section):
    """A job file, paths resolved."""

    model: Model
    data: Data
    prior: Prior = Prior()
    plan: PlanOptions = PlanOptions()
    train: Train
    export: Export = Export()

    def asked(self) -> dict[str, Any]:
        """Every key as "section.key", for JSON. Without the paths: what lies there is known by its
        content, and may be moved.
        """
        paths: Any = {"images": True, "subjects": {"__all__": {"images"}}}
        sections = self.model_dump(mode="json", exclude={"model": {*MODELS}, "data": paths})
        return {
            f"{section}.{key}": value
            for section, keys in sections.items()
            for key, value in keys.items()
        }

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Keys of `asked` that a job need not say, with what they are then."""
        sections: dict[str, Any] = {
            name: field.annotation for name, field in cls.model_fields.items()
        }
        return {
            f"{section}.{key}": field.get_default(call_default_factory=True)
            for section, kind in sections.items()
            for key, field in kind.model_fields.items()
            if not field.is_required()
        }


REMEDIES = {
    "extra_forbidden": "remove it, or correct its spelling",
    "missing": "add it",
}


def read_job(path: Path) -> Job:
    """Read and check a job file.

    Raises:
        BadInput: unreadable, not TOML, or (as `ManyFaults`) every fault with its line.
    """
    text = _text(path)
    if (dots := text.count(".")) > DOTS:
        raise BadInput(
            path,
            found=f"{dots} dots",
            expected=f"a job file (TOML), with at most {DOTS}",
            remedy="see samples/sana.toml; captions go into .txt files beside the images",
        )
    raw = _parsed(path, text)
    faults = _trained_on(path, text, raw)
    job = None
    try:
        job = Job.model_validate(raw)
    except ValidationError as error:
        faults += [_fault(path, text, detail) for detail in error.errors()]
    faults += _relations(path, text, raw) + _paths(path, text, raw)
    raise_any(path, faults)
    assert job is not None
    return _resolve(job, path.parent)


def _text(path: Path) -> str:
    """The text of a job file, without the mark that some editors put before it."""
    try:
        data = read_whole(path)
    except (OSError, ValueError) as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else f"unreadable ({error})"
        raise BadInput(
            path, found=found, expected="a job file (TOML)", remedy="see samples/sana.toml"
        ) from None
    try:
        return utf8(data)
    except ValueError as error:
        raise BadInput(
            path, found=str(error), expected="a job file (TOML)", remedy="save it as UTF-8"
        ) from None


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as error:  # tomllib's own, or a number of thousands of digits
        remedy = WINDOWS_PATHS if BACKSLASH.search(text) else ""
        if re.search("[\u2018\u2019\u201c\u201d]", text):
            remedy = "replace typographic quotes by straight ones"
        raise BadInput(path, found=f"not valid TOML: {error}", remedy=remedy) from None
    except RecursionError:
        raise BadInput(path, found="nested too deep", expected="a job file (TOML)") from None


def _trained_on(path: Path, text: str, raw: dict[str, Any]) -> list[BadInput]:
    """Give [model] path the value of train_on, its other name; a fault if it has both."""
    model = raw.get("model")
    if not isinstance(model, dict) or "train_on" not in model:
        return []
    trained_on = model.pop("train_on")
    if "path" in model:
        return [
            BadInput(
                _place(path, text, ["model", "train_on"]),
                found="model.train_on beside model.path",
                expected="one of them: they are two names of one key",
                remedy="remove path",
            )
        ]
    model["path"] = trained_on
    return []


def _fault(path: Path, text: str, detail: Any) -> BadInput:
    """A pydantic error as a fault of the file, with its line."""
    keys = [part for part in detail["loc"] if isinstance(part, str)]
    found = {
        "extra_forbidden": f"unknown key {'.'.join(keys)}",
        "missing": f"{'.'.join(keys)} is missing",
    }.get(detail["type"], f"{'.'.join(keys)} = {reprlib.repr(detail['input'])}")
    expected = "" if detail["type"] in REMEDIES else detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        expected = f"one of {', '.join(_known_keys(keys[:-1]))}"
    return BadInput(
        _place(path, text, keys),
        found=found,
        expected=expected,
        remedy=REMEDIES.get(detail["type"], ""),
    )


def _known_keys(section: list[str]) -> list[str]:
    model: Any = Job
    for key in section:
        model = model.model_fields[key].annotation
        model = next(iter(get_args(model)), model)  # of a list: its items
    return list(model.model_fields)


def _place(path: Path, text: str, keys: list[str]) -> str:
    """``path:line`` of a key, of its section where the key is not there, else ``path``."""
    section, line_of = [], {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]+", line):
            section = header.group(1).split(".")
            line_of[tuple(section)] = number
        elif entry := re.match(r"\s*([\w.\-\"']+)\s*=", line):
            key = entry.group(1).replace('"', "").replace("'", "").split(".")
            line_of[(*section, *key)] = number
    for end in range(len(keys), 0, -1):
        if tuple(keys[:end]) in line_of:
            return f"{path}:{line_of[tuple(keys[:end])]}"
    return str(path)


def _relations(path: Path, text: str, raw: dict[str, Any]) -> list[BadInput]:
    """Faults between keys; looked for even where keys are wrong, so that all come at once."""
    faults = []

    def section(name: str) -> dict[str, Any]:
        value = raw.get(name)
        return value if isinstance(value, dict) else {}

    train = section("train")
    patch, resolution = train.get("patch"), train.get("resolution")
    if isinstance(patch, int) and isinstance(resolution, int) and patch > resolution:
        faults.append(
            BadInput(
                _place(path, text, ["train", "patch"]),
                found=f"train.patch (s_min) = {patch} is larger than train.resolution (s_max) = "
                f"{resolution}",
                expected="patch <= resolution, in pixels",
                remedy="make patch smaller, e.g. half the resolution",
            )
        )
    faults += _uneven(_place(path, text, ["train", "accumulate"]), train)
    faults += _undrawn(_place(path, text, ["prior", "images"]), section("prior"))
    budget = sorted({"ram", "flash", "step_time"} & section("plan").keys())
    fixed = sorted({"skip_ratio", "inner_skips"} & section("plan").keys())
    if budget and fixed:
        faults.append(
            BadInput(
                _place(path, text, ["plan", fixed[0]]),
                found=f"plan.{fixed[0]} beside plan.{budget[0]}",
                expected="either which blocks to skip, or a budget that decides it",
                remedy=f"remove one; head_skip and tail_skip may stay beside {budget[0]}",
            )
        )
    if "prior" in raw and "prompt" not in section("prior"):
        faults.append(
            BadInput(
                _place(path, text, ["prior"]),
                found="prior.prompt is missing",
                expected="the prompts that are kept",
                remedy='add it: prompt = "a toy", the class of your subject',
            )
        )
    targets = section("export").get("targets")
    unknown = [t for t in targets if t not in TARGETS] if isinstance(targets, list) else []
    if unknown:
        faults.append(
            BadInput(
                _place(path, text, ["export", "targets"]),
                found=f"unknown target {', '.join(map(repr, unknown))}",
                expected=f"one of {', '.join(TARGETS)}",
            )
        )
    return faults


def _uneven(place: str, train: dict[str, Any]) -> list[BadInput]:
    """A fault if the last update of a run would have fewer draws than the others."""
    steps = train.get("steps", Train.model_fields["steps"].default)
    group = train.get("accumulate", 1)
    if not (isinstance(steps, int) and isinstance(group, int) and group > 0 and steps % group):
        return []
    return [
        BadInput(
            place,
            found=f"train.accumulate = {group} with train.steps = {steps}",
            expected="steps, which counts draws, as a multiple of accumulate",
            remedy=f"take steps = {steps + group - steps % group}",
        )
    ]


def _undrawn(place: str, prior: dict[str, Any]) -> list[BadInput]:
    """A fault if the base model would draw no picture of some of a prior's prompts."""
    prompts, images = prior.get("prompt"), prior.get("images", 0)
    if not (isinstance(prompts, list) and isinstance(images, int) and 0 < images < len(prompts)):
        return []
    return [
        BadInput(
            place,
            found=f"prior.images = {images} with {len(prompts)} prompts in prior.prompt",
            expected="a picture of each prompt at least",
            remedy=f"take images = {len(prompts)}",
        )
    ]


def _resolve(job: Job, base: Path) -> Job:
    return job.model_copy(
        update={
            "model": job.model.model_copy(
                update={
                    key: settle(str(value), base)
                    for key in MODELS
                    if (value := getattr(job.model, key)) is not None
                }
            ),
            "data": job.data.model_copy(
                update={
                    "images": path_from(base, job.data.images).resolve(),
                    "subjects": [
                        subject.model_copy(
                            update={"images": path_from(base, subject.images).resolve()}
                        )
                        for subject in job.data.subjects
                    ],
                }
            ),
        }
    )


def _paths(path: Path, text: str, raw: dict[str, Any]) -> list[BadInput]:
    """Folders and files that are not there. Whether the hub has a model is asked later."""
    faults = []
    for keys, value in _named_paths(raw):
        try:
            if keys[0] == "model":
                settle(value, path.parent, ".".join(keys))
            elif not _is_folder(path.parent, value):
                raise BadInput(
                    "",
                    found=f"{'.'.join(keys)}: no folder {path.parent.absolute() / value}",
                    expected="a folder of images",
                    remedy=BESIDE,
                )
        except BadInput as fault:
            odd = "\\" in value or not value.isprintable()  # "C:\new" has a line end in it
            remedy = WINDOWS_PATHS if odd and fault.remedy == BESIDE else fault.remedy
            place = _place(path, text, keys)
            faults.append(
                BadInput(place, found=fault.found, expected=fault.expected, remedy=remedy)
            )
    return faults


def _named_paths(raw: dict[str, Any]) -> Iterator[tuple[list[str], str]]:
    """Every path of a job, with its keys."""
    sections = {name: value for name, value in raw.items() if isinstance(value, dict)}
    named = [(["model", key], sections.get("model", {}).get(key)) for key in MODELS]
    data = sections.get("data", {})
    named.append((["data", "images"], data.get("images")))
    further = data.get("subjects")
    for subject in further if isinstance(further, list) else []:
        images = subject.get("images") if isinstance(subject, dict) else None
        named.append((["data", "subjects", "images"], images))
    yield from ((keys, value) for keys, value in named if isinstance(value, str))


def _is_folder(base: Path, path: str) -> bool:
    """Whether a folder is there; a name that no folder can have is none."""
    try:
        return bool(path.strip()) and path_from(base, path).is_dir()
    except (OSError, ValueError):
        return False
