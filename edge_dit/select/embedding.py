"""Embeds pictures, so that D(x, y) = 1 - cos(embed(x), embed(y)) tells how far two are apart
(docs/method.md, Eq. 2).

The paper embeds with DINO or CLIP. Either is loaded from a folder or hub id, as transformers saves
it. The default is the pipeline's own autoencoder: a picture's latents, as the transformer reads
them, flattened.

Latents compare layout and colour, place by place. They suit two pictures of one seed, not two views
of a subject. They are not centred, because pipelines already shift and scale latents to mean 0, so
unrelated pictures are nearly at a right angle. Measured on tiny-sana: the cosine of pictures of one
toy at other places on other backgrounds is 0.0 to 0.4, and subtracting a grey picture's latents
does not change that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from edge_dit.contract.noise import POSTERIOR
from edge_dit.errors import BadInput
from edge_dit.models.families import PIPELINE_FAMILY, family_of
from edge_dit.models.pipeline import quiet
from edge_dit.reference.precompute import normal_of

KINDS = {
    "dinov2": "DINOv2",
    "dinov2_with_registers": "DINOv2",
    "vit": "DINO",
    "clip": "CLIP",
    "clip_vision_model": "CLIP",
}
"""``model_type`` of a configuration -> name for people. DINO's first version is saved as a ViT."""


@dataclass(frozen=True)
class Embedder:
    """Turns N pictures of one size into unit vectors, float32 [N, D], when it is called.

        vectors = embedder("facebook/dinov2-small", pipeline)([picture, other])

    Attributes:
        name: shown and written to files: "DINOv2 (folder)", "CLIP (openai/...)", "VAE latents".
        where: folder or hub id that it was loaded from; empty for the pipeline's own autoencoder.
        features: makes vectors [N, D] of any length from pictures.
    """

    name: str
    where: str
    features: Callable[[list[Image.Image]], Tensor]

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image]) -> Tensor:
        """Embed N pictures of one size as unit vectors, float32 [N, D]."""
        return torch.nn.functional.normalize(self.features(pictures).float(), dim=1)


def distance(one: Tensor, other: Tensor) -> float:
    """Mean of D over N pairs of unit vectors: 0 for equal pictures, 1 for unrelated ones.

    1 - cos is half the squared difference of unit vectors. It is computed that way because 1 - cos
    rounds to 0 for pictures that are nearly equal.

    Args:
        one, other: float32 [N, D].
    """
    return float((one - other).square().sum(dim=1).mean() / 2)


def embedder(where: str | None, pipeline: Any) -> Embedder:
    """Load DINO, DINOv2 or CLIP, or take the pipeline's autoencoder.

    Args:
        where: folder, or id on the Hugging Face hub; None for the autoencoder.
        pipeline: of a supported family.

    Raises:
        BadInput: the model cannot be loaded, or is of another kind.
    """
    return _latents(pipeline) if where is None else _vision_model(where)


def _latents(pipeline: Any) -> Embedder:
    family = family_of(PIPELINE_FAMILY[type(pipeline).__name__])

    def features(pictures: list[Image.Image]) -> Tensor:
        rows = []
        for picture in pictures:
            pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 127.5 - 1
            batch = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
            # The same noise each time the posterior is sampled, so that equal pictures have equal
            # vectors.
            posterior = partial(normal_of, 0, POSTERIOR)
            rows.append(family.encode_image(pipeline.vae, batch, posterior).flatten())
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
        return output.last_hidden_state[:, 0]  # the class token, which DINO scores compare

    return Embedder(f"{KINDS[kind]} ({'folder' if local else where})", where, features)


def _load(where: str, local: bool) -> tuple[Any, Any, list[str]]:
    """Model, image processor, and names of missing weights, which transformers fills at random."""
    with quiet():
        from transformers import AutoImageProcessor, AutoModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        processor = AutoImageProcessor.from_pretrained(where, local_files_only=local)
        model, report = AutoModel.from_pretrained(
            where, dtype=torch.float32, local_files_only=local, output_loading_info=True
        )
    # DINO is saved without the pooler that a ViT has by default; the class token needs none.
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
