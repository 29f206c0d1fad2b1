"""Load a diffusers folder from disk, whole or without some parts."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_dit.errors import BadInput, require
from edge_dit.models.components import (
    INDEX_FILE,
    Component,
    Pipeline,
    check_folder,
    check_vocabulary,
    refusing,
)
from edge_dit.models.weights import stored_in

CHATTY = ("torchao", "torch.utils._pytree", "peft", "torch.onnx")
"""Loggers that warn about optional parts of other packages."""
ENVIRONMENT = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Variables that those packages read when they are first imported; a user's own value stays."""


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


def load_pipeline(
    folder: Path, keep_text: bool = False, variant: str | None = None, **parts: Any
) -> Any:
    """The pipeline of a folder in float32, without progress bars.

    A part that was saved as absent (Stable Diffusion 3 without its T5) stays absent.

    Args:
        folder: a diffusers folder.
        keep_text: keep text encoders that are stored in bfloat16 as they are. Prompts are then
            encoded in half the memory, but the pipeline itself cannot be called.
        variant: of the weights, where a part has it.
        parts: components to use instead of the stored ones; None leaves one out.

    Raises:
        BadInput: a part cannot be loaded; it is named.
    """
    require("torch", "loading a model")
    require("diffusers", "loading a model")
    stored = Pipeline(folder, variant)
    components = [part for part in stored.components if part.name not in parts]
    for part in components:
        check_folder(part)
        if part.is_tokenizer:
            check_vocabulary(part.folder)
    with quiet():
        from diffusers import DiffusionPipeline

        _silence()
        for part in components:
            if part.is_model:
                parts[part.name] = _load_model(part, variant, keep_text)
            elif part.is_tokenizer:
                parts[part.name] = load_part(part)
        with refusing(folder, "diffusers cannot load it", "a whole pipeline folder"):
            # diffusers wants an absent part passed as None
            pipeline = DiffusionPipeline.from_pretrained(
                folder, local_files_only=True, **{**dict.fromkeys(stored.absent), **parts}
            )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def class_of(part: Component) -> Any:
    """The class that loads a component.

    Raises:
        BadInput: neither diffusers nor transformers has it.
    """
    import importlib

    found = None
    if part.library in ("diffusers", "transformers"):
        with refusing(part.folder, f"{part.library} has no working {part.kind}", "a component"):
            found = getattr(importlib.import_module(part.library), part.kind, None)
    if not hasattr(found, "from_pretrained"):
        raise BadInput(
            part.folder.parent / INDEX_FILE,
            found=f"{part.name} of class {part.kind!r:.80} in {part.library!r:.80}",
            expected="a class of diffusers or transformers, in the versions that are installed",
            remedy="point [model] path at a stock pipeline; code of its own is not run",
        )
    return without_films(found) if part.is_processor else found


def without_films(kind: Any) -> Any:
    """A class of transformers' processors of text, pictures and films, but for films.

    For them alone it would want torchvision.
    """
    kept = [name for name in kind.get_attributes() if name != "video_processor"]
    members = {"get_attributes": classmethod(lambda cls: kept), "__module__": kind.__module__}
    return type(kind.__name__, (kind,), members)


def processor_of(folder: Path) -> Any:
    """The processor of a pipeline folder.

    Raises:
        BadInput: there is none, or it cannot be loaded.
    """
    for part in Pipeline(folder).components:
        if part.is_processor:
            check_folder(part)
            check_vocabulary(part.folder)
            return load_part(part)
    raise BadInput(folder / INDEX_FILE, found="no processor", expected="a whole pipeline")


def load_part(part: Component, **options: Any) -> Any:
    """A component by its class's own from_pretrained.

    Raises:
        BadInput: it cannot be loaded, whatever the library raised.
    """
    kind = class_of(part)
    with quiet(), refusing(part.folder, f"{part.library} cannot load it", part.kind):
        _silence()
        return kind.from_pretrained(part.folder, local_files_only=True, **options)


def _load_model(part: Component, variant: str | None, keep_text: bool) -> Any:
    """A component with weights, in float32 unless ``keep_text`` keeps its bfloat16."""
    import torch

    weights = part.weights(variant)
    tensors = stored_in(weights)
    first = next(iter(tensors.values()), None)
    keeps = keep_text and part.name.startswith("text_encoder")
    kept = keeps and first is not None and first.dtype == "BF16"
    # The weights that were checked, and none of torch's own format beside them.
    options = {"variant": weights.variant, "use_safetensors": True}
    return load_part(part, dtype=torch.bfloat16 if kept else torch.float32, **options)


def _silence() -> None:
    """No messages and no progress bars of diffusers and transformers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for chatter in (diffusers_logging, transformers_logging):
        chatter.set_verbosity_error()
        chatter.disable_progress_bar()
