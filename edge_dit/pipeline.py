"""Loading a diffusers folder, part by part, from disk only."""

from __future__ import annotations

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
"""Read by those packages when they are first imported; what the user set stays."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep third-party chatter about optional parts off the user's screen; errors still raise."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_pipeline(folder: Path, **parts: Any) -> Any:
    """The whole pipeline in float32, from disk, without progress bars.

    Args:
        folder: a diffusers folder.
        parts: components to use instead of the stored ones; None leaves one out.

    Raises:
        BadInput: diffusers cannot load it.
    """
    require("torch", "loading a model")
    require("diffusers", "loading a model")
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
                folder, torch_dtype=torch.float32, local_files_only=True, **parts
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise BadInput(
                folder,
                found=f"diffusers cannot load it: {error}",
                expected="a whole pipeline folder",
                remedy="save or download it again",
            ) from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
