"""A first job for a folder of pictures and a model, with what was chosen and why.

Numbers are those of published training scripts (docs/recipes.md); of a model too small for them,
those of this repository's own small models.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from edge_dit.models.model import Model, open_model
from edge_dit.models.source import locate, settle
from edge_dit.pictures.dataset import Survey, survey
from edge_dit.planning.make import modules_within_a_block

DIFFUSERS = "diffusers, examples/dreambooth/"


@dataclass(frozen=True)
class Recipe:
    """Numbers of a published training run.

    Attributes:
        source: where it is published.
        resolution: pixels.
        lr: learning rate of AdamW.
        steps: of one picture each.
    """

    source: str
    resolution: int
    lr: float
    steps: int


RECIPES = {
    "sana": Recipe(f"{DIFFUSERS}README_sana.md", 1024, 1e-4, 500),
    "flux": Recipe(f"{DIFFUSERS}README_flux.md", 512, 1e-4, 500),
    "sd3": Recipe(f"{DIFFUSERS}README_sd3.md", 512, 4e-4, 500),
    "qwen_image": Recipe(f"{DIFFUSERS}README_qwen.md", 1024, 2e-4, 500),
}
"""Family -> its recipe. FLUX's README takes Prodigy, so its rate is the default of its script."""
OTHER = Recipe("no published recipe of this family; AdamW's as for SANA", 512, 1e-4, 500)
SMALL = 50_000_000
"""Parameters of a transformer below which published recipes say nothing."""
TINY = Recipe("samples/sana.toml: the transformer has few parameters", 128, 3e-3, 700)
RANK = 16
DRAWS = 256
FEW_TOKENS = 32
"""Token rows of a picture below which a patch of half the side loses much (docs/method.md)."""


@dataclass(frozen=True)
class FirstJob:
    """A job file's text, and why each of its numbers was chosen, as lines for people."""

    text: str
    reasons: list[str]


def first_job(images: Path, model: str, subject: str, ram: str | None, base: Path) -> FirstJob:
    """Look at pictures and a model, and write a job for them.

    Args:
        images: folder of pictures.
        model: folder, file or hub id, as `[model] path`.
        subject: what they show, with a word that the model does not know: "a sks toy".
        ram: budget of memory of the device, "3GiB"; None for half of the blocks.
        base: folder of the job file, to which its paths are relative.

    Raises:
        BadInput: no pictures, or faults of them; the model cannot be opened.
    """
    found = survey(images)
    opened = open_model(locate(settle(model, Path.cwd())).folder)
    small = _parameters(opened) < SMALL
    recipe = TINY if small else RECIPES.get(opened.family.name, OTHER)
    side = _side(opened, recipe)
    patch, why_patch = _patch(side, opened.multiple, opened.family.token_step)
    pictures = len(found.listing.pictures)
    draws = max(pictures, min(DRAWS if not small else 400, recipe.steps))
    reasons = [
        f"{pictures} pictures, {len(found.captions.of)} with a caption of their own",
        f"{opened.family.name}: learning rate, steps and resolution by {recipe.source}",
        f"resolution {side}, patch {patch}: {why_patch}",
        f"{draws} draws for {recipe.steps} steps: each is trained on "
        f"{recipe.steps / draws:.1f} times",
        f"a budget of {ram} decides which blocks train"
        if ram
        else "half of the blocks are skipped",
    ]
    if small:
        reasons.append("LoRA on every layer that can carry it: a small model needs them all")
    targets = modules_within_a_block(opened, opened.meta()) if small else []
    text = _TEXT.format(
        model=_quoted(_relative(model, base)),
        images=_quoted(os.path.relpath(images.resolve(), base.resolve())),
        subject=_quoted(subject),
        kept=_quoted(_class_of(subject)),
        captions=_captions(found),
        plan=f"ram = {_quoted(ram)}" if ram else "skip_ratio = 0.5",
        side=side,
        patch=patch,
        why_patch=why_patch,
        rank=RANK,
        lora=f"lora_targets = {json.dumps(targets)}\n" if targets else "",
        lr=recipe.lr,
        steps=recipe.steps,
        source=recipe.source,
        draws=draws,
    )
    return FirstJob(text, reasons)


_TEXT = """\
# Written by edge-dit init. Every key: docs/jobs.md; where the numbers are from: docs/recipes.md.
#   edge-dit run THIS_FILE -o out/

[model]
path = {model}

[data]
images = {images}
prompt = {subject}              # {captions}

# To keep what the model does with other prompts: name many of those that matter to you, here 32. It
# takes a third of the draws, so raise steps by half (docs/method.md, "Prior preservation"):
# [prior]
# prompt = [{kept}, "..."]
# images = 32                   # the base model draws them
# share = 0.33

[plan]
{plan}

[train]
resolution = {side}             # pixels, shorter side
patch = {patch}                 # {why_patch}
rank = {rank}
{lora}lr = {lr:g}               # {source}
steps = {steps}                 # the same
draws = {draws}                 # size of the bank
seed = 0

[export]
targets = ["onnx"]
"""


def _parameters(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.meta().parameters())


def _side(model: Model, recipe: Recipe) -> int:
    """The side that a model draws at: its configuration's, else the recipe's, in whole tokens."""
    sample, patch = model.config.get("sample_size"), model.config.get("patch_size") or 1
    native = sample * model.multiple // patch if isinstance(sample, int) else recipe.resolution
    side = min(native, recipe.resolution)
    return side // model.size_step * model.size_step


def _patch(side: int, multiple: int, step: int) -> tuple[int, str]:
    """Side of a patch, and why."""
    tokens = side // multiple
    share, why = (7 / 8, "it has few tokens") if tokens < FEW_TOKENS else (1 / 2, "as the paper")
    patch = max(1, round(tokens * share / step)) * step * multiple
    return patch, f"{share:g} of the side, {why}"


def _captions(found: Survey) -> str:
    """What of the pictures takes the prompt."""
    without = len(found.uncaptioned)
    return "of pictures without a caption" if without else "every picture has a caption of its own"


def _class_of(subject: str) -> str:
    """A subject without its rare word: "a sks toy" -> "a toy"."""
    words = subject.split()
    return " ".join([*words[:1], *words[2:]]) if len(words) > 2 else subject


def _relative(model: str, base: Path) -> str:
    """A path relative to the job; a hub id as it is."""
    there = Path(model)
    return os.path.relpath(there.resolve(), base.resolve()) if there.exists() else model


def _quoted(text: str | None) -> str:
    """A TOML string; JSON's escapes are TOML's."""
    return json.dumps(text, ensure_ascii=False)
