"""What edge-dit knows of each kind of Diffusion Transformer: one module per family.

Each module of `FAMILIES` implements the interface `family.Family`. `detect` finds the family of a
pipeline folder.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from edge_dit.errors import BadInput
from edge_dit.models.components import read_json

if TYPE_CHECKING:
    from edge_dit.models.families.family import Family

FAMILIES = {
    "sana": ("SanaPipeline", "SanaSprintPipeline"),
    "flux": ("FluxPipeline",),
    "sd3": ("StableDiffusion3Pipeline",),
    "pixart": ("PixArtSigmaPipeline",),
    "qwen_image": ("QwenImagePipeline",),
    "lumina2": ("Lumina2Pipeline",),
    "chroma": ("ChromaPipeline",),
    "flux2": ("Flux2KleinPipeline",),
    "z_image": ("ZImagePipeline",),
    "krea2": ("Krea2Pipeline",),
    "qwen_image21": ("QwenImage21Pipeline",),
}
"""Family module -> pipeline classes in model_index.json."""
PIPELINE_FAMILY = {pipeline: name for name, pipelines in FAMILIES.items() for pipeline in pipelines}
UNSUPPORTED = {
    "HunyuanDiTPipeline": "its blocks have long skips, so a run of blocks is no residual",
    "HiDreamImagePipeline": "every block takes another text layer",
    "FluxKontextPipeline": "its training pairs an image with another one",
    "Flux2Pipeline": "of FLUX.2 only klein is supported",
    "Flux2KleinKVPipeline": "its pictures are made from reference pictures",
    "PixArtAlphaPipeline": "only PixArt-Sigma is supported",
}
"""Why some well-known pipelines are not supported."""


@cache
def family_of(name: str) -> Family:
    """The family called ``name`` (imports torch)."""
    return importlib.import_module(f"edge_dit.models.families.{name}").FAMILY


def detect(model: Path) -> str:
    """The family name of a diffusers pipeline folder, read from model_index.json.

    Raises:
        BadInput: not a folder, no readable model_index.json, or a class no family supports.
    """
    index = model / "model_index.json"
    supported = ", ".join(sorted(PIPELINE_FAMILY))
    remedy = f"point [model] path at a diffusers pipeline folder of one of: {supported}"
    if not model.is_dir():
        raise BadInput(model, found="no such folder", expected="a diffusers folder", remedy=remedy)
    if not index.is_symlink() and not index.exists():
        raise BadInput(
            model, found="no model_index.json in it", expected="a diffusers folder", remedy=remedy
        )
    name = read_json(index, "a diffusers pipeline").get("_class_name")
    if not isinstance(name, str):
        raise BadInput(
            index,
            found=f"pipeline class {name!r:.80}",
            expected=f"one of {supported}",
            remedy=remedy,
        )
    if name not in PIPELINE_FAMILY:
        why = f" ({UNSUPPORTED[name]})" if name in UNSUPPORTED else ""
        raise BadInput(
            index,
            found=f"pipeline class {name}{why}",
            expected=f"one of {supported}",
            remedy=remedy,
        )
    return PIPELINE_FAMILY[name]
