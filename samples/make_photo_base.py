"""Make samples/tiny-sana-photos: tiny-sana, trained on with photographs.

    python samples/make_photo_base.py --work DIR [--out samples/tiny-sana-photos]

tiny-sana has seen drawn scenes alone, and does not learn what a photographed cat looks like from
four pictures. This one goes on from samples/tiny-sana with as many crops of photographs as scenes,
at 128 px. They come with scikit-image and scikit-learn (`pip install scikit-learn`; the extra
"test" has scikit-image). Chelsea, the cat of samples/photos, is not among them. Ten minutes on one
core; a stopped training resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import SanaPipeline
from safetensors.torch import load_file

from make_tiny_sana import encode_told_and_plain, flow_loss, latents_of
from scenes import draw, random_scene
from training import (
    SEED,
    TRANSFORMER,
    noisy_batch,
    random_crop,
    save_latents,
    save_pipeline,
    to_tensor,
    train,
)

EACH = 300
"""Crops of a photograph."""
STEPS, BATCH = 1_000, 12


@dataclass(frozen=True)
class Photograph:
    """A picture that a package ships.

    Attributes:
        caption: what it shows.
        licence: and whose it is, as the package says.
        load: uint8 [H, W, 3].
    """

    caption: str
    licence: str
    load: Callable[[], np.ndarray]


def captioned_photographs() -> list[Photograph]:
    """Of scikit-image and scikit-learn."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    nasa = "public domain, NASA"
    return [
        Photograph("a photo of an astronaut", nasa, data.astronaut),
        Photograph("a photo of a cup of coffee", "CC0, Rachel Michetti", data.coffee),
        Photograph("a photo of a rocket", "public domain, SpaceX", data.rocket),
        Photograph("a photo of galaxies in the sky", nasa, data.hubble_deep_field),
        Photograph(
            "a photo of a motorcycle", "CC0, Middlebury", lambda: data.stereo_motorcycle()[0]
        ),
        Photograph("a photo of a retina", "CC0, Häggström", data.retina),
        Photograph(
            "a photo of a temple",
            "CC BY 2.0, danielbuechele",
            lambda: load_sample_image("china.jpg"),
        ),
        Photograph(
            "a photo of a flower", "CC BY 2.0, vultilion", lambda: load_sample_image("flower.jpg")
        ),
    ]


@torch.no_grad()
def make_latents(work: Path, folder: Path, pipe: SanaPipeline) -> dict:
    """Crops of photographs and as many scenes: whole [N, 8, 16, 16], text [N, TOKENS, channels],
    text_mask [N, TOKENS]; empty, empty_mask and scale as `make_tiny_sana.latents_of` has them.
    """
    done = work / "photo-latents.safetensors"
    if done.exists():
        return load_file(done)
    rng = np.random.default_rng([SEED, 3])
    captions, pictures = [], []
    for photograph in captioned_photographs():
        whole = np.asarray(photograph.load())
        for _ in range(EACH):
            captions.append(photograph.caption)
            pictures.append(random_crop(whole, rng))
    for _ in range(len(captions)):
        scene = random_scene(rng)
        captions.append(scene.caption())
        pictures.append(draw(scene, rng))
    data = latents_of(folder, pipe)
    parts = []
    for first in range(0, len(pictures), 100):
        pixels = to_tensor(np.stack(pictures[first : first + 100]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            parts.append(pipe.vae.encode(pixels).latent.float())
    data["whole"] = (torch.cat(parts) / data["scale"]).half()
    data["text"], data["text_mask"] = encode_told_and_plain(pipe, captions)
    save_latents(data, done)
    return data


def main() -> None:
    torch.set_num_threads(1)
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate files")
    parser.add_argument("--out", type=Path, default=here / "tiny-sana-photos")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    folder = here / "tiny-sana"
    pipe = SanaPipeline.from_pretrained(folder, dtype=torch.float32)
    data = make_latents(arguments.work, folder, pipe)
    model = pipe.transformer.to(memory_format=torch.channels_last).requires_grad_(True).train()

    def loss_at(step: int) -> torch.Tensor:
        draw_from = torch.Generator().manual_seed(SEED + 900_000 + step)
        return flow_loss(model, noisy_batch(data, "whole", BATCH, draw_from), data, "")

    schedule = replace(TRANSFORMER, steps=STEPS, peak=6e-4, decay=0.6)
    pipe.transformer = train("photographs", model, loss_at, arguments.work, schedule)
    pipe.transformer.to(memory_format=torch.contiguous_format)
    save_pipeline(pipe, arguments.out)


if __name__ == "__main__":
    main()
