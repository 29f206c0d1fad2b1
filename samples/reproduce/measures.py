"""What a generated picture of a toy is worth: is it the toy, and is it where the caption says?

`similarity`: cosine of an embedding between generated and held-out real pictures. The embedding:
the toy is found by its distance from the background's colour, put on grey, cut out in a window
around its centre (so that place and background count for nothing), and sent through the encoder of
tiny-sana's autoencoder - a small network trained on drawn scenes and photographs. The outputs of
its last three stages, averaged over a 4 x 4 grid, are standardised by mean and deviation over
unrelated scenes. Two views of one toy have a cosine of 0.61 on average, two toys 0.02, a toy and an
unrelated scene 0.00. It knows colours and where they sit; it is no DINO.

`adherence`: the background's colour is nearest to the caption's, and the toy's centre of mass is
nearest to the caption's place; each counts one half.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC
from PIL import Image

from scenes import BACKGROUNDS, POSITIONS, SIDE, draw, random_scene

EYE = Path(__file__).resolve().parents[1] / "tiny-sana" / "vae"
FRAME = 4  # pixels at the edge that tell the background
FAR = 40  # levels of 255 in one channel that set a toy apart from it
WINDOW = 96  # pixels, side of what is cut out
GRID = 4
SCENES = 96
SHIFT = 20  # pixels that "at the left" is left of the middle


def standard(picture: Image.Image) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3], the size that the pixel counts here are about."""
    return np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def find_toy(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colour of the background [3], where the toy is (bool [H, W]), and its centre (x, y)."""
    edges = (pixels[:FRAME], pixels[-FRAME:], pixels[:, :FRAME], pixels[:, -FRAME:])
    ground = np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)
    toy = np.abs(pixels - ground).max(axis=-1) > FAR
    middle = np.array([SIDE, SIDE]) / 2
    centre = np.argwhere(toy).mean(axis=0)[::-1] + 0.5 if toy.any() else middle
    return ground, toy, centre


def adherence(picture: Image.Image, position: str, background: str) -> float:
    """Of background and place, the share that is as the caption says."""
    ground, toy, centre = find_toy(standard(picture))
    away = {k: np.linalg.norm(ground - colour) for k, colour in BACKGROUNDS.items()}
    places = {k: SHIFT * np.array(place) + SIDE / 2 for k, place in POSITIONS.items()}
    off = {k: np.linalg.norm(centre - place) for k, place in places.items()}
    right = min(away, key=away.__getitem__) == background
    return (right + (toy.any() and min(off, key=off.__getitem__) == position)) / 2


@functools.cache
def encoder() -> torch.nn.Module:
    return AutoencoderDC.from_pretrained(EYE, local_files_only=True).encoder.eval()


def cut_out(picture: Image.Image) -> np.ndarray:
    """The toy on grey, in a window around its centre: uint8 [WINDOW, WINDOW, 3]."""
    pixels = standard(picture)
    _, toy, centre = find_toy(pixels)
    half = WINDOW // 2
    on_grey = np.pad(
        np.where(toy[..., None], pixels, 128),
        ((half, half), (half, half), (0, 0)),
        constant_values=128,
    )
    left, top = centre.round().astype(int)
    return on_grey[top : top + WINDOW, left : left + WINDOW]


@torch.no_grad()
def features(pictures: list[Image.Image]) -> torch.Tensor:
    """[pictures, channels x GRID x GRID]."""
    seen = np.stack([cut_out(picture) for picture in pictures])
    batch = torch.from_numpy(seen).permute(0, 3, 1, 2).float() / 127.5 - 1
    stages: list[torch.Tensor] = []
    hooks = [
        stage.register_forward_hook(lambda _m, _a, output: stages.append(output))
        for stage in encoder().down_blocks[1:]
    ]
    encoder()(batch)
    for hook in hooks:
        hook.remove()
    pooled = [torch.nn.functional.adaptive_avg_pool2d(stage, GRID).flatten(1) for stage in stages]
    return torch.cat(pooled, dim=1)


@functools.cache
def unrelated() -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the features over unrelated scenes."""
    rng = np.random.default_rng(5)
    scenes = [replace(random_scene(rng), size="large") for _ in range(SCENES)]
    found = features([Image.fromarray(draw(scene, rng)) for scene in scenes])
    return found.mean(0), found.std(0) + 1e-3 * found.std()


def embed(pictures: list[Image.Image]) -> torch.Tensor:
    """Unit vectors, [pictures, ...]."""
    mean, deviation = unrelated()
    return torch.nn.functional.normalize((features(pictures) - mean) / deviation, dim=1)


def similarity(generated: list[Image.Image], real: list[Image.Image]) -> float:
    """Mean cosine over all pairs."""
    return float((embed(generated) @ embed(real).T).mean())
