"""Draw what a caption says: "a large red and white striped ring at the left on a blue background".

    python samples/scenes.py scenes.png        # a sheet of 40 random scenes, captions on stdout

Everything is drawn from a `numpy.random.Generator`, so a seed fixes pictures and captions.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIDE = 128  # pixels
OVERSAMPLE = 3  # drawn this much larger, then averaged: antialiased edges

COLOURS = {
    "red": (214, 40, 40),
    "orange": (244, 140, 30),
    "yellow": (250, 214, 60),
    "green": (44, 150, 70),
    "blue": (40, 86, 200),
    "purple": (132, 60, 170),
    "white": (246, 246, 246),
    "black": (24, 24, 28),
}
BACKGROUNDS = {
    "blue": (120, 176, 236),
    "green": (160, 214, 150),
    "pink": (246, 186, 206),
    "gray": (168, 168, 172),
    "yellow": (250, 236, 170),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "creature")
PATTERNS = ("plain", "striped", "dotted", "checkered")
POSITIONS = {
    "at the left": (-1, 0),
    "at the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "in the middle": (0, 0),
}
SIZES = {"small": (17.0, 20.0), "large": (28.0, 33.0)}  # range of the radius, pixels


@dataclass(frozen=True)
class Scene:
    """What a caption says; the rest (exact place, size, phase of a pattern) is left to chance."""

    size: str
    colour: str
    shape: str
    pattern: str
    second: str  # second colour of the pattern, equal to `colour` when plain
    position: str
    background: str

    def caption(self) -> str:
        surface = self.colour
        if self.pattern != "plain":
            surface = f"{self.colour} and {self.second} {self.pattern}"
        thing = f"a {self.size} {surface} {self.shape}"
        return f"{thing} {self.position} on a {self.background} background"


def pick(rng: np.random.Generator, options) -> str:
    options = tuple(options)
    return options[rng.integers(len(options))]


def random_scene(rng: np.random.Generator) -> Scene:
    """One scene; half of them plain, one in five a creature."""
    background = pick(rng, BACKGROUNDS)
    colour = pick(rng, [name for name in COLOURS if name != background])
    pattern = pick(rng, PATTERNS[1:]) if rng.random() < 0.5 else "plain"
    second = colour
    if pattern != "plain":
        second = pick(rng, [name for name in COLOURS if name not in (colour, background)])
    shape = "creature" if rng.random() < 0.2 else pick(rng, SHAPES[:-1])
    return Scene(
        size=pick(rng, SIZES),
        colour=colour,
        shape=shape,
        pattern=pattern,
        second=second,
        position=pick(rng, POSITIONS),
        background=background,
    )


def draw(scene: Scene, rng: np.random.Generator, wild: bool = False) -> np.ndarray:
    """Picture of a scene: uint8 [SIDE, SIDE, 3].

    wild: colours of any kind instead of the named ones, for training the autoencoder.
    """
    named = [COLOURS[scene.colour], COLOURS[scene.second], BACKGROUNDS[scene.background]]
    if wild:
        named = rng.integers(0, 256, (3, 3))
    jitter = rng.uniform(-8, 8, (3, 3))
    first, second, ground = np.clip(np.add(named, jitter), 0, 255).astype(np.float32)

    radius = rng.uniform(*SIZES[scene.size])
    centre = SIDE / 2 + 27.0 * np.array(POSITIONS[scene.position]) + rng.uniform(-3, 3, 2)

    canvas = SIDE * OVERSAMPLE
    mask = Image.new("L", (canvas, canvas))
    pen = ImageDraw.Draw(mask)
    cx, cy = (float(v) * OVERSAMPLE for v in centre)
    r = float(radius) * OVERSAMPLE
    if scene.shape == "creature":
        draw_body(pen, cx, cy, r, rng)
    else:
        draw_shape(pen, scene.shape, cx, cy, r)

    weight = surface(scene.pattern, canvas, radius * OVERSAMPLE, rng)[..., None]
    inside = np.asarray(mask, np.float32)[..., None] / 255
    painted = first * (1 - weight) + second * weight
    picture = Image.fromarray((ground * (1 - inside) + painted * inside).astype(np.uint8))
    if scene.shape == "creature":
        draw_face(ImageDraw.Draw(picture), cx, cy, r, rng)
    return np.asarray(picture.reduce(OVERSAMPLE))


def surface(pattern: str, canvas: int, r: float, rng: np.random.Generator) -> np.ndarray:
    """Where the second colour goes: float [canvas, canvas] of 0 and 1."""
    period = max(0.5 * r, 10.0 * OVERSAMPLE)
    phase = rng.uniform(0, period, 2).astype(np.float32)
    y = np.arange(canvas, dtype=np.float32)[:, None] + phase[0]
    x = np.arange(canvas, dtype=np.float32)[None, :] + phase[1]
    if pattern == "striped":
        return np.repeat(y % period < period / 2, canvas, 1).astype(np.float32)
    if pattern == "checkered":
        return ((y % period < period / 2) ^ (x % period < period / 2)).astype(np.float32)
    if pattern == "dotted":
        away = np.hypot(y % period - period / 2, x % period - period / 2)
        return (away < 0.32 * period).astype(np.float32)
    return np.zeros((canvas, canvas), np.float32)


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, cx: float, cy: float, r: float) -> None:
    """Fill one shape that fits a circle of radius r around (cx, cy), canvas pixels."""

    def polygon(radii, angles):
        x, y = (
            cx + r * np.multiply(radii, np.cos(angles)),
            cy + r * np.multiply(radii, np.sin(angles)),
        )
        pen.polygon(list(zip(x, y, strict=True)), 255)

    def box(w, h):
        pen.rectangle((cx - w * r, cy - h * r, cx + w * r, cy + h * r), 255)

    if shape in ("circle", "ring"):
        pen.ellipse((cx - r, cy - r, cx + r, cy + r), 255)
    if shape == "ring":
        hole = 0.5 * r
        pen.ellipse((cx - hole, cy - hole, cx + hole, cy + hole), 0)
    elif shape == "square":
        box(0.86, 0.86)
    elif shape == "cross":
        box(0.95, 0.32)
        box(0.32, 0.95)
    elif shape == "triangle":
        polygon([1.1] * 3, np.deg2rad([-90, 30, 150]))
    elif shape == "star":
        polygon([1.1, 0.46] * 5, np.deg2rad(-90 + 36 * np.arange(10)))
    elif shape == "heart":
        t = np.linspace(0, 2 * np.pi, 60)
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        pen.polygon(list(zip(cx + r * x / 16, cy + r * y / 16, strict=True)), 255)


def draw_body(pen: ImageDraw.ImageDraw, cx: float, cy: float, r: float, rng) -> None:
    """Body, feet and ears (or a feeler) of a random creature."""
    wide, high = rng.uniform(0.62, 0.85) * r, rng.uniform(0.62, 0.78) * r
    body = (cx - wide, cy - high, cx + wide, cy + high)
    for side in (-1, 1):
        foot = cx + side * 0.45 * wide
        pen.rounded_rectangle((foot - 0.16 * r, cy, foot + 0.16 * r, cy + high + 0.2 * r), 6, 255)
    ears = pick(rng, ("round", "pointed", "feeler", "none"))
    for side in (-1, 1):
        x, y = cx + side * 0.62 * wide, cy - 0.85 * high
        if ears == "round":
            pen.ellipse((x - 0.24 * r, y - 0.24 * r, x + 0.24 * r, y + 0.24 * r), 255)
        elif ears == "pointed":
            pen.polygon(
                [(x - 0.25 * r, y + 0.2 * r), (x, y - 0.4 * r), (x + 0.25 * r, y + 0.2 * r)], 255
            )
    if ears == "feeler":
        pen.rectangle((cx - 0.05 * r, cy - high - 0.3 * r, cx + 0.05 * r, cy), 255)
        top = cy - high - 0.25 * r
        pen.ellipse((cx - 0.13 * r, top - 0.13 * r, cx + 0.13 * r, top + 0.13 * r), 255)
    if rng.random() < 0.5:
        pen.ellipse(body, 255)
    else:
        pen.rounded_rectangle(body, 0.3 * r, 255)


def draw_face(pen: ImageDraw.ImageDraw, cx: float, cy: float, r: float, rng) -> None:
    """One or two eyes and a mouth."""
    eye = rng.uniform(0.17, 0.27) * r
    places = (0,) if rng.random() < 0.3 else (-1, 1)
    for side in places:
        x, y = cx + side * 0.3 * r, cy - 0.18 * r
        pen.ellipse((x - eye, y - eye, x + eye, y + eye), (250, 250, 250))
        pen.ellipse((x - eye / 2, y - eye / 2, x + eye / 2, y + eye / 2), (20, 20, 24))
    if rng.random() < 0.6:
        pen.rounded_rectangle(
            (cx - 0.25 * r, cy + 0.28 * r, cx + 0.25 * r, cy + 0.42 * r), 4, (60, 20, 24)
        )


def sheet(pictures: list, columns: int, gap: int = 4) -> Image.Image:
    """Contact sheet of equally large uint8 [H, W, 3] pictures, row by row."""
    high, wide = np.asarray(pictures[0]).shape[:2]
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * (wide + gap) + gap, rows * (high + gap) + gap), "white")
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        at = (gap + column * (wide + gap), gap + row * (high + gap))
        page.paste(Image.fromarray(np.asarray(picture)), at)
    return page


if __name__ == "__main__":
    generator = np.random.default_rng(0)
    chosen = [random_scene(generator) for _ in range(40)]
    print("\n".join(scene.caption() for scene in chosen))
    sheet([draw(scene, generator) for scene in chosen], 8).save(sys.argv[1])
