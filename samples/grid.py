"""Contact sheets of a sample checkpoint: captions drawn by it, pictures through its autoencoder.

    python samples/grid.py tiny-sana    # writes tiny-sana-grid.png, tiny-sana-reconstructions.png
    python samples/grid.py tiny-flux

Grid: in each row one word of the caption changes, from the same noise. Reconstructions: above the
input, below what the autoencoder makes of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from scenes import SIDE, draw, random_scene, sheet

HERE = Path(__file__).parent
SETTINGS = {  # how each is drawn with
    "tiny-sana": {"use_resolution_binning": False},
    "tiny-flux": {"guidance_scale": 2.5, "num_inference_steps": 20, "max_sequence_length": 32},
}
ROWS = (  # the changing word, and the caption it changes in
    (("red", "green", "blue", "orange", "black", "white"),
     "a large {} circle in the middle on a yellow background"),
    (("square", "triangle", "star", "heart", "cross", "creature"),
     "a large purple {} in the middle on a white background"),
    (("at the left", "at the right", "at the top", "at the bottom", "in the middle"),
     "a small red square {} on a gray background"),
    (("blue", "green", "pink", "gray", "yellow", "white"),
     "a large orange star at the left on a {} background"),
    (("red", "red and white striped", "red and white dotted", "red and white checkered"),
     "a large {} circle at the right on a blue background"),
    (("large yellow ring", "small yellow ring", "large green creature", "small green creature",
      "large blue and yellow striped creature", "large black and orange dotted heart"),
     "a {} at the bottom on a pink background"),
)  # fmt: skip


def titled(picture: Image.Image, title: str) -> np.ndarray:
    """The picture with a line of text under it: uint8 [H + 14, W, 3]."""
    page = Image.new("RGB", (picture.width, picture.height + 14), "white")
    page.paste(picture)
    ImageDraw.Draw(page).text((2, picture.height + 1), title[:24], "black", font_size=10)
    return np.asarray(page)


def caption_grid(pipe: DiffusionPipeline, **settings) -> Image.Image:
    columns = max(len(words) for words, _ in ROWS)
    blank = np.full((SIDE + 14, SIDE, 3), 255, np.uint8)
    cells = []
    for seed, (words, caption) in enumerate(ROWS):
        pictures = pipe(
            [caption.format(word) for word in words],
            height=SIDE,
            width=SIDE,
            generator=[torch.Generator().manual_seed(seed) for _ in words],
            **settings,
        ).images
        row = [titled(picture, word) for picture, word in zip(pictures, words, strict=True)]
        cells += row + [blank] * (columns - len(row))
    return sheet(cells, columns)


@torch.no_grad()
def reconstructions(pipe: DiffusionPipeline) -> Image.Image:
    rng = np.random.default_rng(1)
    pictures = [draw(random_scene(rng), rng) for _ in range(4)]
    files = sorted(HERE.glob("subject/*/*.png"))[::4] + sorted(HERE.glob("photos/*.jpg"))
    for file in files:
        pictures.append(np.asarray(Image.open(file).convert("RGB").resize((SIDE, SIDE))))
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    encoded = pipe.vae.encode(pixels)
    latent = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    decoded = pipe.vae.decode(latent).sample
    back = ((decoded.clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
    return sheet(pictures + list(back), len(pictures))


def main() -> None:
    name = sys.argv[1]
    pipe = DiffusionPipeline.from_pretrained(HERE / name, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    caption_grid(pipe, **SETTINGS[name]).save(HERE / f"{name}-grid.png", optimize=True)
    reconstructions(pipe).save(HERE / f"{name}-reconstructions.png", optimize=True)


if __name__ == "__main__":
    main()
