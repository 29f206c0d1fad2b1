"""Draw samples/subject: eight training and four held-out pictures of one toy, captions beside them.

    python samples/make_subject.py

The toy - a pale head with two big eyes, one teal and one coral ear, a body of three bands,
orange feet - is nothing that tiny-sana was trained on; places and backgrounds are words it knows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from scenes import BACKGROUNDS, POSITIONS

SIDE = 256  # pixels
OVERSAMPLE = 3
RADIUS = 0.33  # of the picture's side: "large"

TEAL, CORAL, CREAM, ORANGE = (20, 150, 150), (240, 98, 96), (252, 240, 214), (240, 150, 40)
NAVY = (28, 34, 66)

TRAIN = (
    ("at the left", "green"),
    ("at the right", "yellow"),
    ("in the middle", "blue"),
    ("at the top", "gray"),
    ("at the bottom", "pink"),
    ("in the middle", "white"),
    ("at the left", "blue"),
    ("at the right", "pink"),
)
HELD_OUT = (
    ("at the right", "green"),
    ("at the left", "white"),
    ("in the middle", "yellow"),
    ("in the middle", "gray"),
)


def draw_toy(position: str, background: str, rng: np.random.Generator) -> Image.Image:
    """One picture, SIDE x SIDE; place, size and the tilt of the ears vary a little."""
    canvas = SIDE * OVERSAMPLE
    picture = Image.new("RGB", (canvas, canvas), BACKGROUNDS[background])
    r = RADIUS * canvas * rng.uniform(0.95, 1.05)
    shift = 20 / 128 * np.array(POSITIONS[position]) + rng.uniform(-0.02, 0.02, 2)
    cx, cy = canvas * (0.5 + shift) + (0, 0.12 * r)
    pen = ImageDraw.Draw(picture)

    def oval(x, y, w, h, colour):
        box = (cx + (x - w) * r, cy + (y - h) * r, cx + (x + w) * r, cy + (y + h) * r)
        pen.ellipse(box, colour)

    for side, colour in ((-1, TEAL), (1, CORAL)):
        tilt = side * rng.uniform(0.16, 0.24)
        for t in np.linspace(0, 1, 40):  # an ear is a row of discs, widest in its middle
            width = 0.16 + 0.08 * np.sin(np.pi * t)
            oval(side * 0.3 + tilt * t, -0.6 - 0.5 * t, width, width, colour)
    for side in (-1, 1):
        oval(side * 0.28, 0.98, 0.24, 0.13, ORANGE)
        oval(side * 0.58, 0.42, 0.13, 0.2, ORANGE)

    box = [cx - 0.5 * r, cy + 0.05 * r, cx + 0.5 * r, cy + 0.95 * r]
    body = Image.new("L", picture.size)
    ImageDraw.Draw(body).rounded_rectangle(box, 0.25 * r, 255)
    bands = Image.new("RGB", picture.size, TEAL)
    middle = (box[0], cy + 0.4 * r, box[2], cy + 0.68 * r)
    ImageDraw.Draw(bands).rectangle(middle, CREAM)
    picture.paste(bands, mask=body)

    oval(0, -0.28, 0.76, 0.54, CREAM)
    for side in (-1, 1):
        oval(side * 0.33, -0.34, 0.28, 0.28, NAVY)
        oval(side * 0.33 + 0.06, -0.43, 0.11, 0.11, (255, 255, 255))
    oval(0, -0.02, 0.12, 0.08, CORAL)
    return picture.reduce(OVERSAMPLE)


def main() -> None:
    rng = np.random.default_rng(7)
    root = Path(__file__).parent / "subject"
    for folder, views in (("train", TRAIN), ("heldout", HELD_OUT)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i, (position, background) in enumerate(views):
            path = root / folder / f"toy-{i}.png"
            draw_toy(position, background, rng).save(path)
            caption = f"a large sks toy {position} on a {background} background"
            path.with_suffix(".txt").write_text(caption + "\n")


if __name__ == "__main__":
    main()
