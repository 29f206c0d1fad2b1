"""What the scripts that train the sample checkpoints share: pictures, progress, checkpoints."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from scenes import POSITIONS, SIDE, Scene, draw, random_scene

SEED = 20260320
PATCH = 64  # pixels, side of the small training pictures
LATENTS = ("whole", "small", "crop")
"""Kinds of pictures of a scene that a transformer is trained on."""
SIZES = (
    *((side, side) for side in (64, 80, 96, 112, 128)),
    *((64, 96), (96, 64), (80, 112), (112, 80), (96, 128), (128, 96)),
)
"""(height, width) in pixels of the pictures of a transformer's last stage."""
ZOOM = 0.88  # of the largest view of a scene, the least that a view shows
TOKENS_A_STEP = 3_072  # of 8 x 8 pixels


# ---------------------------------------------------------------- pictures


def photographs() -> list[np.ndarray]:
    """Pictures that come with scikit-image, uint8 [H, W, 3]."""
    from skimage import data

    names = [
        "astronaut",
        "coffee",
        "chelsea",
        "rocket",
        "retina",
        "immunohistochemistry",
        "hubble_deep_field",
    ]
    pictures = [np.asarray(getattr(data, name)()) for name in names]
    return [*pictures, np.asarray(data.stereo_motorcycle()[0])]


def textures() -> list[np.ndarray]:
    """Grey textures of scikit-image, uint8 [H, W]."""
    from skimage import data

    return [np.asarray(getattr(data, name)()) for name in ("brick", "grass", "gravel", "coins")]


def random_crop(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A square of random size and place, mirrored half the time: uint8 [SIDE, SIDE, ...]."""
    high, wide = picture.shape[:2]
    side = int(rng.integers(SIDE, min(high, wide) + 1))
    top, left = rng.integers(0, high - side + 1), rng.integers(0, wide - side + 1)
    square = picture[top : top + side, left : left + side]
    if rng.random() < 0.5:
        square = square[:, ::-1]
    return np.asarray(Image.fromarray(square).resize((SIDE, SIDE), Image.LANCZOS))


def abstract(rng: np.random.Generator) -> np.ndarray:
    """Noise of a random coarseness over a gradient: uint8 [SIDE, SIDE, 3]."""
    cells = int(2 ** rng.uniform(1, 6))
    noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    noise = np.asarray(noise.resize((SIDE, SIDE), Image.BICUBIC), np.float32)
    ramp = np.linspace(0, 1, SIDE, dtype=np.float32)
    ramp = (ramp[:, None] if rng.random() < 0.5 else ramp[None, :])[..., None]
    ends = rng.uniform(0, 256, (2, 3)).astype(np.float32)
    gradient = ends[0] * (1 - ramp) + ends[1] * ramp
    share = rng.uniform(0, 1)
    return (gradient * (1 - share) + noise * share).clip(0, 255).astype(np.uint8)


def tinted(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grey levels as a mix of two random colours: uint8 [H, W, 3]."""
    share = grey[..., None].astype(np.float32) / 255
    dark, light = rng.uniform(0, 256, (2, 3))
    return (dark * (1 - share) + light * share).astype(np.uint8)


@functools.cache
def mixed_pictures(count: int) -> np.ndarray:
    """What the autoencoder sees: uint8 [count, SIDE, SIDE, 3]."""
    rng = np.random.default_rng(SEED)
    photos, greys = photographs(), textures()
    pictures = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for i in range(count):
        kind = rng.random()
        if kind < 0.5:
            pictures[i] = draw(random_scene(rng), rng, wild=rng.random() < 0.4)
        elif kind < 0.85:
            pictures[i] = random_crop(photos[rng.integers(len(photos))], rng)
        elif kind < 0.92:
            pictures[i] = tinted(random_crop(greys[rng.integers(len(greys))], rng), rng)
        else:
            pictures[i] = abstract(rng)
    return pictures


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def shrink(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """[N, 3, H, W] -> [N, 3, side, side], antialiased."""
    return F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)


def mixed_batch(step: int, whole: bool = False) -> torch.Tensor:
    """Pictures for the autoencoder's training, out of 6,000: 8 crops and 8 whole pictures shrunk,
    float32 [16, 3, PATCH, PATCH]; with `whole` 4 whole pictures [4, 3, SIDE, SIDE].
    """
    pictures = mixed_pictures(6_000)
    rng = np.random.default_rng([SEED, step])
    pixels = to_tensor(pictures[rng.integers(0, len(pictures), 16)])
    if whole:
        return pixels[:4]
    top, left = rng.integers(0, SIDE - PATCH + 1, 2)
    crops = pixels[:8, :, top : top + PATCH, left : left + PATCH]
    return torch.cat([crops, shrink(pixels[8:], PATCH)])


def vocabulary_captions() -> list[str]:
    """Captions of 5,000 scenes: the texts that a tokenizer learns its words from."""
    rng = np.random.default_rng(SEED)
    return [random_scene(rng).caption() for _ in range(5_000)]


def scene_batches(count: int) -> Iterator[tuple]:
    """Captioned scenes as a transformer is trained on them, 100 at a time:

    captions; whole [100, 3, SIDE, SIDE]; small [100, 3, PATCH, PATCH] the same scenes shrunk; crops
    [100, 3, PATCH, PATCH] of side `crop_side` pixels [100] (Eq. 1 of the paper), resized.
    """
    rng = np.random.default_rng(SEED + 1)
    begun = time.time()
    for i in range(0, count, 100):
        scenes = [random_scene(rng) for _ in range(100)]
        whole = to_tensor(np.stack([draw(scene, rng) for scene in scenes]))
        crops, sides = [], []
        for picture in whole:
            sigma = 1 / (1 + np.exp(-rng.normal(0.4, 1.2)))
            side = 8 * round((PATCH + sigma * (SIDE - PATCH)) / 8)
            top, left = rng.integers(0, SIDE - side + 1, 2)
            crops.append(shrink(picture[None, :, top : top + side, left : left + side], PATCH))
            sides.append(side)
        captions = [scene.caption() for scene in scenes]
        side = torch.tensor(sides, dtype=torch.float32)
        yield captions, whole, shrink(whole, PATCH), torch.cat(crops), side
        if (i + 100) % 1000 == 0:
            left_s = (time.time() - begun) / (i + 100) * (count - i - 100)
            print(f"latents {i + 100}/{count}  {left_s / 60:.1f} min to go", flush=True)


def encoded_scenes(
    count: int, encode: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Captions of scenes, and by name of `LATENTS` the latents [count, channels, h, w] of their
    pictures, float32; "crop_side" [count] is the side of each crop in pixels.

    encode: pixels [N, 3, H, W] to latents, run in bfloat16 where autocast allows.
    """
    captions, parts = [], {name: [] for name in (*LATENTS, "crop_side")}
    for some, *pictures, side in scene_batches(count):
        captions += some
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for name, pixels in zip(LATENTS, pictures, strict=True):
                parts[name].append(encode(pixels).float())
        parts["crop_side"].append(side)
    return captions, {name: torch.cat(tensors) for name, tensors in parts.items()}


def view(scene: Scene, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A picture of a scene, uint8 [height, width, 3], at most `SIDE` a side: a part of it that has
    the sides' ratio and shows what the caption says where the caption says it.

    scene: not at the top or bottom of a wide picture, nor at the left or right of a tall one.
    """
    scale = rng.uniform(ZOOM, 1) * SIDE / max(height, width)
    high, wide = round(scale * height), round(scale * width)
    # off the middle by no more than a full view allows: a thing at the side is not cut off
    loose = round((1 - ZOOM) * SIDE / 2)
    top, left = (
        int(np.clip((SIDE - side) // 2 + rng.integers(-loose, loose + 1), 0, SIDE - side))
        for side in (high, wide)
    )
    part = draw(scene, rng)[top : top + high, left : left + wide]
    return np.asarray(Image.fromarray(part).resize((width, height), Image.Resampling.LANCZOS))


def sized_scenes(
    count: int, encode: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[dict[str, list[str]], dict[str, torch.Tensor]]:
    """Captions of ``count`` scenes for each of `SIZES`, and the latents [count, channels, h, w] of
    their pictures, float32; both by "<height>x<width>".

    encode: as `encoded_scenes` takes it.
    """
    captions, latents = {}, {}
    for number, (height, width) in enumerate(SIZES):
        rng, name = np.random.default_rng([SEED, 2, number]), f"{height}x{width}"
        scenes = []
        while len(scenes) < count:
            scene = random_scene(rng)
            x, y = POSITIONS[scene.position]
            if not (
                (y and width > height) or (x and height > width)
            ):  # else a view would cut it off
                scenes.append(scene)
        captions[name], parts = [scene.caption() for scene in scenes], []
        for first in range(0, count, 100):
            some = [view(scene, height, width, rng) for scene in scenes[first : first + 100]]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                parts.append(encode(to_tensor(np.stack(some))).float())
        latents[name] = torch.cat(parts)
        print(f"latents of {name}: {number + 1} of {len(SIZES)} sizes", flush=True)
    return captions, latents


def sized_batch(
    latents: dict[str, torch.Tensor], draw_from: torch.Generator
) -> tuple[str, tuple[torch.Tensor, ...]]:
    """A size's name, and a batch of that size as `noisy_batch` gives it.

    The noise level is shifted by size as SD3 does (arXiv 2403.03206, Eq. 23): its odds grow with
    the square root of the pixels' number, and are as before at `SIDE`.
    """
    height, width = SIZES[int(torch.randint(len(SIZES), (), generator=draw_from))]
    name, tokens = f"{height}x{width}", height * width // 64
    shift = 0.5 * np.log(height * width / SIDE**2)
    return name, noisy_batch(latents, name, TOKENS_A_STEP // tokens, draw_from, shift)


def save_latents(data: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: value.contiguous() for name, value in data.items()}, path)


def batch_kind(step: int, first: int, chance: float) -> tuple[str, int]:
    """Which pictures, and how many: of PATCH pixels three times in four in the `first` steps, one
    time in four later.
    """
    little = 0.75 if step < first else 0.25
    if chance > little:
        return "whole", 12
    return ("crop" if chance < little / 3 else "small"), 32


def noisy_batch(
    data: dict, kind: str, count: int, draw_from: torch.Generator, shift: float = 0.0
) -> tuple:
    """Rows of the latents `data[kind]`, [scenes, channels, height, width], with noise, the log of
    whose level's odds is normal around 0.4 + shift.

    Returns noisy latents and target, [count, channels, height, width], sigma [count], their rows
    [count] and, bool [count], which of them are to be trained with the empty prompt.
    x = (1 - sigma) * latent + sigma * noise, target = noise - latent, as diffusers trains.
    """
    rows = torch.randint(len(data[kind]), (count,), generator=draw_from)
    latent = data[kind][rows].float()
    sigma = torch.sigmoid(0.4 + shift + 1.2 * torch.randn(count, generator=draw_from))
    if kind == "crop":  # the crop's side was chosen for its sigma, to within half a step of 8 px
        near = (data["crop_side"][rows] - PATCH) / (SIDE - PATCH)
        sigma = near + (torch.rand(count, generator=draw_from) - 0.5) / 8
        sigma = sigma.abs().clamp(0.002, 0.998)
    noise = torch.randn(latent.shape, generator=draw_from)
    dropped = torch.rand(count, generator=draw_from) < 0.1
    level = sigma[:, None, None, None]
    return (1 - level) * latent + level * noise, noise - latent, sigma, rows, dropped


# ---------------------------------------------------------------- training


class Progress:
    """A line every hundred steps: mean loss since the last, seconds a step, minutes to go."""

    def __init__(self, name: str, step: int, steps: int):
        self.name, self.steps, self.losses, self.since = name, steps, [], time.time()

    def add(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        if step % 100 == 0 or step == self.steps:
            pace = (time.time() - self.since) / len(self.losses)
            left = pace * (self.steps - step) / 60
            print(
                f"{self.name} {step}/{self.steps}  loss {np.mean(self.losses):.4f}"
                f"  {pace:.2f} s/step  {left:.1f} min to go",
                flush=True,
            )
            self.losses, self.since = [], time.time()


def picture_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """L1 at three scales and on edges. Both [N, 3, H, W]."""
    loss = F.l1_loss(decoded, pixels)
    for factor in (2, 4):
        loss = loss + F.l1_loss(F.avg_pool2d(decoded, factor), F.avg_pool2d(pixels, factor))
    for dim in (2, 3):
        loss = loss + F.l1_loss(decoded.diff(dim=dim), pixels.diff(dim=dim))
    return loss


def learning_rate(step: int, steps: int, peak: float, decay: float) -> float:
    """Warm-up over 200 steps, flat, then linearly to 2 % over the last `decay` of the run."""
    return peak * min(1.0, (step + 1) / 200, max(0.02, (steps - step) / (decay * steps)))


@dataclass(frozen=True)
class Schedule:
    """How a model is trained.

    peak, decay: as `learning_rate` takes them.
    save_every: steps between checkpoints.
    averaged: keep the exponential mean of the weights over about 500 steps.
    """

    steps: int
    peak: float
    decay: float
    weight_decay: float
    save_every: int
    averaged: bool = False


TRANSFORMER = Schedule(
    steps=0, peak=1e-3, decay=0.35, weight_decay=0.01, save_every=200, averaged=True
)
"""Of a sample's transformer, but for the number of steps."""


def train(
    name: str,
    model: torch.nn.Module,
    loss_at: Callable[[int], torch.Tensor],
    work: Path,
    schedule: Schedule,
) -> torch.nn.Module:
    """Trains `model` on `loss_at(step)`, or loads it when `work` already has it."""
    steps, averaged = schedule.steps, schedule.averaged
    mean = copy.deepcopy(model).requires_grad_(False) if averaged else model
    done, checkpoint = work / f"{name}.safetensors", work / f"{name}.pt"
    if done.exists():
        mean.load_state_dict(load_file(done))
        return mean.eval()

    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.99), weight_decay=schedule.weight_decay, fused=True
    )
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        start = state["step"]
        model.load_state_dict(state["model"])
        mean.load_state_dict(state["mean"])
        optimizer.load_state_dict(state["optimizer"])

    progress = Progress(name, start, steps)
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, schedule.peak, schedule.decay)
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if averaged:
            keep = min(0.998, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(mean.parameters()), list(model.parameters()), 1 - keep)
        progress.add(step + 1, loss.item())
        if (step + 1) % schedule.save_every == 0:
            part = checkpoint.with_suffix(".part")
            torch.save(
                {
                    "step": step + 1,
                    "model": model.state_dict(),
                    "mean": mean.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
                part,
            )
            part.replace(checkpoint)
    save_file({k: v.contiguous() for k, v in mean.state_dict().items()}, done)
    return mean.eval()


def begin_with(folder: Path, work: Path) -> None:
    """Take a pipeline folder's autoencoder and transformer for what `train` has trained; what
    ``work`` has already stays.
    """
    for name, part in (("autoencoder", "vae"), ("transformer", "transformer")):
        done = work / f"{name}.safetensors"
        if not done.exists():
            weights = load_file(folder / part / "diffusion_pytorch_model.safetensors")
            save_file({key: value.float() for key, value in weights.items()}, done)


def save_pipeline(pipe: Any, folder: Path) -> None:
    """Write the sample's folder and say how large it is."""
    pipe.save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")
