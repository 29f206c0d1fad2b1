"""Names of tensors that host and device agree on, and which file names are allowed.

Batch tensors, which a bank stores for every draw:

    entry, entry_text        state before the first trained block; text only with joint attention
    cond.<name>              conditioning of the family; `read_by` says who reads it
    cond.outside_<what>.<block>
                             what a block is given of what is around a window
                             (`edge_dit.models.families.parts.surroundings`)
    residual.<first>, residual_text.<first>
                             what blocks skipped between trained ones add, from block <first> on
    tail_residual            what the blocks after the last trained one add, where it is `STORED`
    target                   what the prediction is compared with
    weight                   factor of the loss, where draws are weighted
    weight_mask              in its place where draws have masks: factor of each token's loss

LoRA tensors have their diffusers names. Outputs are "loss" and "grad.<lora name>".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator

T = TypeVar("T")

Tail = Literal["stored", "fresh", "through"]
STORED, FRESH, THROUGH = TAILS = ("stored", "fresh", "through")
"""What takes the place of the blocks after the last trained one, the tail (docs/method.md):

    stored    the base model's residual, from the bank; the paper's way
    fresh     the blocks themselves run on the adapted state; their residual counts as a constant
    through   the blocks themselves, and the gradient goes back through them
"""

ENTRY, ENTRY_TEXT = "entry", "entry_text"
STATE = (ENTRY, ENTRY_TEXT)
"""What flows between blocks: image tokens [1, N, D] and, with joint attention, text tokens."""
COND = "cond."
"""Prefix of the conditioning tensors."""
OUTSIDE = "outside_"
"""Beginning of the names of conditioning that says what is around a window."""
AT_HEAD = "head"
"""The head among the readers of conditioning, see `read_by`; the others are names of blocks."""
RESIDUAL, RESIDUAL_TEXT = "residual", "residual_text"
TAIL_RESIDUAL, TARGET = "tail_residual", "target"
WEIGHT, WEIGHT_MASK = "weight", "weight_mask"
LOSS, GRAD, NEW = "loss", "grad.", "new."
"""The loss; prefix of a gradient; prefix of the new value of an input."""
ADAPTED = "adapter."
"""Prefix of the LoRA tensors in a training state, besides `MOMENTS`."""
MOMENTS = ("exp_avg.", "exp_avg_sq.")
"""Prefixes of AdamW's first and second moments, named as in torch.optim."""
LORA_B = ".lora_B."
"""In the names of all LoRA tensors that are B."""
SUM, SUMMED, AVERAGE = "sum.", "summed", "ema."
"""In a training state that is smoothed: prefix of sums of gradients, number of their draws,
prefix of the adapter's average."""
LEARNING_RATE, STEP = "lr", "step"
SAMPLER_INPUTS, PATCH = ("image", "sigma", "uv"), "patch"
"""Arguments and result of the patch sampler."""


def is_b(name: str) -> bool:
    """Whether a LoRA tensor is B, [out, rank]; else it is A, [rank, in]."""
    return LORA_B in name


def residual_names(first: int) -> tuple[str, str]:
    """Names of the image and text residual of the skipped blocks that begin with ``first``."""
    return f"{RESIDUAL}.{first}", f"{RESIDUAL_TEXT}.{first}"


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is a plain file name on every system: no path, no drive, not hidden."""
    return bool(re.fullmatch(r"[^./\\:\x00-\x1f][^/\\:\x00-\x1f]{0,254}", name))


def _plain(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError("not the plain name of a file")
    return name


def _relative(path: str) -> str:
    for part in path.split("/"):
        _plain(part)
    return path


PlainName = Annotated[str, AfterValidator(_plain)]
RelativePath = Annotated[str, AfterValidator(_relative)]


# ---------------------------------------------------------------- who reads which conditioning


def read_by(place: str, cond: Mapping[str, T]) -> dict[str, T]:
    """What one place reads of a model's conditioning, by the names that it has there.

    "temb" is read everywhere, "temb.transformer_blocks" by the blocks of that list,
    "temb.transformer_blocks.3" by that block and "temb.head" by the head; each as "temb".

    Args:
        place: name of a block, or `AT_HEAD`.
        cond: whatever goes by the names of conditioning.
    """
    readers = ("", place.partition(".")[0], place)
    found = {}
    for name, value in cond.items():
        local, _, reader = name.partition(".")
        if reader in readers:
            found[local] = value
    return found


def read_in(places: Iterable[str], cond: Mapping[str, T]) -> dict[str, T]:
    """What any of some places reads of a model's conditioning, by its full names.

    Args:
        places: names of blocks, or `AT_HEAD`.
        cond: whatever goes by the names of conditioning.
    """
    names = {name: name for name in cond}
    read = {name for place in places for name in read_by(place, names).values()}
    return {name: value for name, value in cond.items() if name in read}
