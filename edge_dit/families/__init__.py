"""What edge-dit knows of each Diffusion Transformer: one module a family.

A family module offers, as plain functions and constants:

    NAME, PIPELINES, TRANSFORMER      names in diffusers' own spelling
    LORA_TARGETS                      modules of a block that carry LoRA by default
    blocks(model)                     the transformer blocks, in order
    condition(model, ...)             what every block and the head read besides the hidden state
    run_block(block, h, cond, ...)    one block
    head(model, h, cond, ...)         from the last hidden state to the prediction
    capture(model, ...)               entry state, tail residual, conditioning of one draw
    encode_image, encode_prompts      as the family's own pipeline does
    sigmas(scheduler_config)          the noise levels its scheduler knows
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

from edge_dit.errors import BadInput

PIPELINE_FAMILY = {"SanaPipeline": "sana"}
"""Pipeline class in model_index.json -> family module."""


def family_module(name: str) -> ModuleType:
    """The module of family ``name`` (imports torch)."""
    return importlib.import_module(f"edge_dit.families.{name}")


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
    try:
        name = json.loads(index.read_text())["_class_name"]
    except FileNotFoundError:
        raise BadInput(
            model, found="no model_index.json in it", expected="a diffusers folder", remedy=remedy
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(index, found=f"unreadable ({error})", remedy=remedy) from None
    if name not in PIPELINE_FAMILY:
        raise BadInput(
            index, found=f"pipeline class {name}", expected=f"one of {supported}", remedy=remedy
        )
    return PIPELINE_FAMILY[name]
