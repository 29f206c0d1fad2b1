"""Pictures as vectors, so that D(x, y) = 1 - cos(embed(x), embed(y)) says how far two are apart
(docs/method.md, Eq. 2).

The paper embeds with DINO or CLIP; either is taken from a folder or hub id, as transformers stores
it. Without one the pipeline's own autoencoder serves: the latents of a picture, as the transformer
sees them, flattened. They are not centred: pipelines shift and scale latents to mean 0, so that
unrelated pictures are near a right angle already (tiny-sana: cosines of one toy at other places on
other backgrounds are 0.0 to 0.4, and the same after subtracting a grey picture's latents). Latents
compare layout and colour, place by place; two pictures of one seed, not two views of a subject.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from edge_dit.errors import BadInput
from edge_dit.models.families import PIPELINE_FAMILY, family_of
from edge_dit.models.pipeline import quiet

KINDS = {
    "dinov2": "DINOv2",
    "dinov2_with_registers": "DINOv2",
    "vit": "DINO",
    "clip": "CLIP",
    "clip_vision_model": "CLIP",
}
"""``model_type`` of a configuration -> its name; DINO's first version is stored as a ViT."""


@dataclass(frozen=True)
class Embedder:
    """Calling it turns N pictures (PIL, of one size) into unit vectors, float32 [N, D].

    Attributes:
        name: for people and files: "DINOv2 (folder)", "CLIP (openai/...)", "VAE latents".
        where: folder or hub id that it was loaded from; empty for the pipeline's own autoencoder.
        features: pictures to vectors [N, D] of any length.
    """

    name: str
    where: str
    features: Callable[[list[Image.Image]], Tensor]

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image]) -> Tensor:
        """Embed pictures; see the class."""
        return torch.nn.functional.normalize(self.features(pictures).float(), dim=1)


def distance(one: Tensor, other: Tensor) -> float:
    """Mean of D over pairs of unit vectors [N, D]: 0 for equal pictures, 1 for unrelated ones.

    1 - cos is half the squared difference of unit vectors; computed so, pictures that are nearly
    equal keep their distance, where 1 - cos would round to 0.
    """
    return float((one - other).square().sum(dim=1).mean() / 2)


def embedder(where: str | None, pipeline: Any) -> Embedder:
    """DINO, DINOv2 or CLIP from ``where``, else the pipeline's autoencoder.

    Args:
        where: folder, or id on the Hugging Face hub; None for the autoencoder.
        pipeline: of a supported family.

    Raises:
        BadInput: it cannot be loaded, or is another kind of model.
    """
    return _latents(pipeline) if where is None else _vision_model(where)


def _latents(pipeline: Any) -> Embedder:
    family = family_of(PIPELINE_FAMILY[type(pipeline).__name__])

    def features(pictures: list[Image.Image]) -> Tensor:
        rows = []
        for picture in pictures:
            pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 127.5 - 1
            batch = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
            # A posterior is sampled with the same noise every time: equal pictures, equal vectors.
            generator = torch.Generator().manual_seed(0)
            rows.append(family.encode_image(pipeline.vae, batch, generator).flatten())
        return torch.stack(rows)

    return Embedder("VAE latents", "", features)


def _vision_model(where: str) -> Embedder:
    local = Path(where).is_dir()
    try:
        model, processor, missing = _load(where, local)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise _unusable(where, f"transformers cannot load it: {_first_line(error)}") from None
    kind = model.config.model_type
    if kind not in KINDS:
        raise _unusable(where, f"a model of type {kind}")
    if missing:
        raise _unusable(
            where, f"{len(missing)} tensors are missing, {missing[0]} the first of them"
        )

    def features(pictures: list[Image.Image]) -> Tensor:
        pixels = processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt")
        if kind == "clip":
            return model.get_image_features(**pixels).pooler_output
        output = model(**pixels)
        if kind == "clip_vision_model":
            return output.pooler_output
        return output.last_hidden_state[:, 0]  # the class token, which DINO's scores are made of

    return Embedder(f"{KINDS[kind]} ({'folder' if local else where})", where, features)


def _load(where: str, local: bool) -> tuple[Any, Any, list[str]]:
    """Model, image processor, and names of weights that transformers would make up."""
    with quiet():
        from transformers import AutoImageProcessor, AutoModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        processor = AutoImageProcessor.from_pretrained(where, local_files_only=local)
        model, report = AutoModel.from_pretrained(
            where, dtype=torch.float32, local_files_only=local, output_loading_info=True
        )
    # DINO is stored without the pooler that a ViT has by default; the class token needs none.
    missing = sorted(n for n in report["missing_keys"] if not n.startswith("pooler."))
    return model.eval(), processor, missing


def _unusable(where: str, found: str) -> BadInput:
    return BadInput(
        where,
        found=found,
        expected="DINO, DINOv2 or CLIP with its preprocessor_config.json, as transformers saves it",
        remedy="name such a folder or hub id, or none: the pipeline's own autoencoder",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
