"""Load a diffusers folder from disk, whole or without some parts."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_dit.errors import BadInput, require

CHATTY = ("torchao", "torch.utils._pytree", "peft", "torch.onnx")
"""Loggers that warn about optional parts of other packages."""
ENVIRONMENT = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Variables that those packages read when they are first imported; a user's own value stays."""
VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("tokenizer.model",),
)
"""Files that hold a vocabulary; a tokenizer of a supported family has one of these sets."""
EXPECTED, REMEDY = "a whole pipeline folder", "save or download it again"


@contextmanager
def quiet() -> Iterator[None]:
    """Hide third-party warnings about optional parts; errors are still raised."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_pipeline(folder: Path, keep_text: bool = False, **parts: Any) -> Any:
    """The pipeline of a folder in float32, without progress bars.

    A part that was saved as absent (Stable Diffusion 3 without its T5) stays absent.

    Args:
        folder: a diffusers folder.
        keep_text: keep text encoders that are stored in bfloat16 as they are. Prompts are then
            encoded in half the memory, but the pipeline itself cannot be called.
        parts: components to use instead of the stored ones; None leaves one out.

    Raises:
        BadInput: diffusers cannot load it.
    """
    require("torch", "loading a model")
    require("diffusers", "loading a model")
    stored, absent = _parts(folder)
    for name in stored:
        if name not in parts and not (folder / name).is_dir():
            raise BadInput(folder / name, found="no such folder", expected=EXPECTED, remedy=REMEDY)
        if name.startswith("tokenizer"):
            check_vocabulary(folder / name)
    with quiet():
        import torch
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        for chatter in (diffusers_logging, transformers_logging):
            chatter.set_verbosity_error()
            chatter.disable_progress_bar()
        try:
            pipeline = DiffusionPipeline.from_pretrained(
                folder,
                dtype={**_text_dtypes(folder, stored, keep_text), "default": torch.float32},
                local_files_only=True,
                # diffusers wants an absent part passed as None
                **{**dict.fromkeys(absent), **parts},
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise BadInput(
                folder,
                found=f"diffusers cannot load it: {error}",
                expected=EXPECTED,
                remedy=REMEDY,
            ) from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_vocabulary(tokenizer: Path) -> None:
    """Raise `BadInput` when a tokenizer's folder holds no vocabulary.

    transformers 5 would silently make a tokenizer of special tokens only
    (tokenization_utils_tokenizers.py).
    """
    if not any(all((tokenizer / name).is_file() for name in names) for names in VOCABULARIES):
        raise BadInput(
            tokenizer,
            found="no vocabulary in it",
            expected="one of " + ", ".join(" with ".join(names) for names in VOCABULARIES),
            remedy=REMEDY,
        )


def _parts(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the parts that a pipeline folder stores, and of those that it was saved without.

    Raises:
        BadInput: no readable model_index.json.
    """
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        parts = {name: kind for name, kind in index.items() if isinstance(kind, list)}
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput(
            path, found=f"unreadable ({error})", expected=EXPECTED, remedy=REMEDY
        ) from None
    stored = [name for name, kind in parts.items() if any(kind)]
    return stored, [name for name in parts if name not in stored]


def _text_dtypes(folder: Path, parts: list[str], keep: bool) -> dict[str, Any]:
    """bfloat16 for each text encoder that is stored so, if ``keep``."""
    import torch
    from safetensors import safe_open

    dtypes = {}
    for part in parts if keep else []:
        file = next(iter(sorted((folder / part).glob("*.safetensors"))), None)
        if part.startswith("text_encoder") and file is not None:
            with safe_open(file, framework="pt") as tensors:
                name = next(iter(tensors.keys()), None)
                if name is not None and tensors.get_slice(name).get_dtype() == "BF16":
                    dtypes[part] = torch.bfloat16
    return dtypes
