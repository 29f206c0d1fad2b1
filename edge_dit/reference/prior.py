"""The base model's own pictures, for prior draws (DreamBooth, arXiv 2208.12242, sec. 3.2)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_dit.models.model import Model
from edge_dit.models.pipeline import load_pipeline
from edge_dit.pictures.captions import clean
from edge_dit.pictures.images import write_picture
from edge_dit.progress import bar
from edge_dit.store.files import cache_folder, write_atomic


def base_pictures(model: Model, prompts: Sequence[str], count: int, side: int) -> Path:
    """A folder of pictures that the base model draws, captions beside them; those that an earlier
    call drew are not drawn again.

    The folder is in the user's cache. It belongs to model, prompts and size, and to nobody's
    pictures: other jobs use it too. Picture n has prompt n modulo their number, and starts from
    the noise of seed n.

    Args:
        model: the base model.
        prompts: of the pictures, in turn.
        count: number of pictures.
        side: of each, pixels.

    Raises:
        BadInput: a part of the pipeline cannot be loaded.
    """
    texts = list(dict.fromkeys(clean(text) for text in prompts))
    asked = json.dumps([model.hash, model.variant, texts, count, side])
    folder = cache_folder() / "prior" / hashlib.sha256(asked.encode()).hexdigest()
    missing = [n for n in range(count) if not (folder / f"prior-{n}.png").is_file()]
    if missing:
        pipeline = load_pipeline(model.folder, variant=model.variant)
        with bar("pictures of the base model", len(missing)) as advance:
            for number in missing:
                text, path = texts[number % len(texts)], folder / f"prior-{number}.png"
                (picture,) = model.family.sample(pipeline, text, side, [number])
                write_atomic(path.with_suffix(".txt"), text + "\n")
                write_picture(path, np.asarray(picture.convert("RGB")))
                advance()
    return folder
