"""Eight toys that the tiny checkpoints have never seen, each drawn from a list of coloured parts.

    python samples/reproduce/subjects.py DIR    # DIR/<toy>/{train,heldout}/*.png, captions beside

Views are those of samples/subject (eight to train on, four held out), captions too: "a large sks
toy at the left on a green background". The first half of the toys is for the ablations; what is
tuned beforehand, such as the choice of blocks, should use the other half.
"""

from __future__ import annotations

import io
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.append(str(Path(__file__).resolve().parents[1]))

from edge_dit.store.files import write_atomic
from make_subject import HELD_OUT, OVERSAMPLE, RADIUS, SIDE, TRAIN
from scenes import BACKGROUNDS, POSITIONS

VIEWS = {"train": TRAIN, "heldout": HELD_OUT}
TILT = 6.0  # degrees, at most

# "oval" and "box": centre x, y, half width, half height; "poly": corners x, y. In units of the
# toy's radius; y points down.
Part = tuple[str, str, tuple[float, ...]]

COLOURS = {
    "navy": (28, 34, 66), "ink": (24, 24, 28), "snow": (252, 252, 252), "cream": (252, 240, 214),
    "red": (214, 44, 48), "coral": (240, 98, 96), "orange": (244, 140, 30), "gold": (250, 200, 40),
    "lime": (150, 210, 50), "forest": (30, 110, 60), "teal": (20, 150, 150), "sky": (80, 170, 240),
    "royal": (40, 70, 190), "violet": (130, 70, 190), "magenta": (220, 50, 140),
    "brown": (130, 80, 45), "tan": (205, 160, 105), "slate": (96, 108, 130),
}  # fmt: skip


def pair(shape: str, colour: str, x: float, *rest: float) -> list[Part]:
    """A part and its mirror image."""
    return [(shape, colour, (side * x, *rest)) for side in (-1, 1)]


def eyes(x: float, y: float, r: float, white: str = "snow") -> list[Part]:
    """Two eyes with pupils."""
    return pair("oval", white, x, y, r, r) + pair("oval", "ink", x, y, 0.55 * r, 0.6 * r)


TOYS: dict[str, list[Part]] = {
    "robot": [
        ("box", "slate", (0, -0.85, 0.04, 0.15)),
        ("oval", "red", (0, -0.98, 0.11, 0.11)),
        *pair("box", "slate", 0.68, 0.42, 0.1, 0.3),
        *pair("oval", "gold", 0.68, 0.74, 0.14, 0.14),
        ("box", "violet", (0, 0.4, 0.56, 0.4)),
        ("box", "gold", (0, 0.4, 0.3, 0.14)),
        ("box", "sky", (0, -0.36, 0.68, 0.38)),
        *pair("box", "navy", 0.3, -0.42, 0.19, 0.16),
        *pair("box", "lime", 0.3, -0.42, 0.1, 0.08),
        ("box", "navy", (0, -0.12, 0.36, 0.06)),
        *pair("oval", "ink", 0.36, 0.88, 0.2, 0.16),
    ],
    "penguin": [
        *pair("oval", "orange", 0.3, 0.93, 0.26, 0.1),
        *pair("oval", "royal", 0.66, 0.3, 0.16, 0.42),
        ("oval", "navy", (0, 0.1, 0.66, 0.88)),
        ("oval", "snow", (0, 0.4, 0.46, 0.5)),
        ("box", "red", (0, -0.1, 0.6, 0.11)),
        ("box", "red", (0.36, 0.16, 0.1, 0.3)),
        *eyes(0.24, -0.46, 0.19),
        ("poly", "orange", (-0.16, -0.34, 0.16, -0.34, 0, -0.12)),
    ],
    "mushroom": [
        ("box", "cream", (0, 0.45, 0.42, 0.5)),
        ("oval", "lime", (-0.55, 0.88, 0.28, 0.12)),
        ("oval", "forest", (0.55, 0.88, 0.28, 0.12)),
        ("oval", "magenta", (0, -0.28, 0.92, 0.58)),
        ("box", "tan", (0, 0.1, 0.86, 0.08)),
        *pair("oval", "snow", 0.56, -0.3, 0.17, 0.19),
        ("oval", "gold", (0, -0.48, 0.25, 0.24)),
        *pair("oval", "ink", 0.2, 0.42, 0.08, 0.13),
        ("oval", "coral", (0, 0.66, 0.13, 0.07)),
    ],
    "fish": [
        ("poly", "royal", (0.5, 0, 0.98, -0.5, 0.86, 0, 0.98, 0.5)),
        ("poly", "royal", (-0.25, -0.4, 0.2, -0.9, 0.4, -0.35)),
        ("poly", "royal", (-0.15, 0.4, 0.15, 0.85, 0.35, 0.35)),
        ("oval", "orange", (-0.1, 0, 0.8, 0.56)),
        ("box", "snow", (-0.15, 0, 0.09, 0.55)),
        ("box", "ink", (0.02, 0, 0.05, 0.54)),
        ("box", "snow", (0.36, 0, 0.08, 0.42)),
        ("oval", "snow", (-0.52, -0.14, 0.2, 0.2)),
        ("oval", "ink", (-0.56, -0.14, 0.11, 0.12)),
        ("oval", "red", (-0.84, 0.14, 0.1, 0.07)),
    ],
    "rocket": [
        ("poly", "orange", (-0.26, 0.66, 0.26, 0.66, 0, 1.0)),
        ("poly", "gold", (-0.14, 0.66, 0.14, 0.66, 0, 0.86)),
        *(("poly", "red", (s * 0.3, 0.1, s * 0.74, 0.74, s * 0.3, 0.6)) for s in (-1, 1)),
        ("oval", "cream", (0, 0, 0.44, 0.92)),
        ("box", "slate", (0, 0.66, 0.34, 0.1)),
        ("poly", "red", (-0.37, -0.5, 0.37, -0.5, 0, -1.0)),
        ("oval", "slate", (0, -0.14, 0.28, 0.28)),
        ("oval", "sky", (0, -0.14, 0.2, 0.2)),
        ("box", "royal", (0, 0.36, 0.36, 0.08)),
    ],
    "cupcake": [
        ("poly", "teal", (-0.72, 0.15, 0.72, 0.15, 0.48, 0.95, -0.48, 0.95)),
        *(("poly", "navy", (x, 0.15, x + 0.12, 0.15, 0.72 * x + 0.1, 0.95, 0.72 * x, 0.95))
          for x in (-0.5, -0.2, 0.1, 0.4)),
        ("oval", "magenta", (0, 0.05, 0.84, 0.26)),
        ("oval", "snow", (0, -0.24, 0.64, 0.24)),
        ("oval", "magenta", (0, -0.5, 0.42, 0.22)),
        ("oval", "red", (0, -0.8, 0.18, 0.18)),
        ("oval", "gold", (-0.4, 0.02, 0.08, 0.06)),
        ("oval", "lime", (0.3, 0.08, 0.08, 0.06)),
        ("oval", "sky", (0.1, -0.26, 0.08, 0.06)),
    ],
    "owl": [
        *pair("oval", "tan", 0.3, 0.93, 0.18, 0.09),
        *(("poly", "brown", (s * 0.2, -0.7, s * 0.66, -1.0, s * 0.6, -0.4)) for s in (-1, 1)),
        ("oval", "brown", (0, 0.08, 0.72, 0.88)),
        ("oval", "lime", (0, 0.42, 0.44, 0.46)),
        *pair("oval", "forest", 0.64, 0.3, 0.15, 0.4),
        *eyes(0.3, -0.32, 0.28, "gold"),
        ("poly", "orange", (-0.11, -0.16, 0.11, -0.16, 0, 0.08)),
    ],
    "car": [
        ("poly", "sky", (-0.5, -0.1, -0.32, -0.56, 0.34, -0.56, 0.56, -0.1)),
        ("box", "slate", (0, -0.33, 0.05, 0.24)),
        ("box", "red", (0, 0.18, 0.95, 0.3)),
        ("box", "snow", (0, 0.14, 0.95, 0.07)),
        ("oval", "gold", (-0.84, 0.1, 0.1, 0.1)),
        *pair("oval", "ink", 0.52, 0.5, 0.27, 0.27),
        *pair("oval", "tan", 0.52, 0.5, 0.12, 0.12),
        ("box", "violet", (0, -0.62, 0.28, 0.07)),
    ],
}  # fmt: skip


def subjects() -> dict[str, list[Part]]:
    """Every toy's parts by name, back to front."""
    return TOYS


def caption(position: str, background: str) -> str:
    return f"a large sks toy {position} on a {background} background"


def draw_toy(
    parts: list[Part], position: str, background: str, rng: np.random.Generator
) -> Image.Image:
    """One picture, SIDE x SIDE pixels; place, size and tilt vary a little."""
    return on_background(cut_out(parts, position, rng), background)


def cut_out(parts: list[Part], position: str, rng: np.random.Generator) -> Image.Image:
    """A toy on nothing: RGBA, OVERSAMPLE times SIDE pixels a side."""
    canvas = SIDE * OVERSAMPLE
    r = RADIUS * canvas * rng.uniform(0.95, 1.05)
    shift = 20 / 128 * np.array(POSITIONS[position]) + rng.uniform(-0.02, 0.02, 2)
    centre = canvas * (0.5 + shift)
    toy = Image.new("RGBA", (canvas, canvas))
    pen = ImageDraw.Draw(toy)
    for shape, colour, numbers in parts:
        if shape == "poly":
            corners = centre + r * np.reshape(numbers, (-1, 2))
            pen.polygon([tuple(corner) for corner in corners], COLOURS[colour])
        else:
            middle, half = centre + r * np.array(numbers[:2]), r * np.array(numbers[2:])
            box = [*(middle - half), *(middle + half)]
            if shape == "oval":
                pen.ellipse(box, COLOURS[colour])
            else:
                pen.rounded_rectangle(box, 0.3 * half.min(), COLOURS[colour])
    tilt = rng.uniform(-TILT, TILT)
    return toy.rotate(tilt, Image.Resampling.BICUBIC, center=tuple(centre))


def on_background(toy: Image.Image, background: str) -> Image.Image:
    """A toy of `cut_out` on a plain background, SIDE x SIDE pixels."""
    picture = Image.new("RGB", toy.size, BACKGROUNDS[background])
    picture.paste(toy, mask=toy)
    return picture.reduce(OVERSAMPLE)


def write_subject(name: str, folder: Path) -> None:
    """Write ``folder``/{train,heldout}/toy-<n>.png with captions; the same bytes every time."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for part, views in VIEWS.items():
        for number, (position, background) in enumerate(views):
            data = io.BytesIO()
            draw_toy(TOYS[name], position, background, rng).save(data, "PNG")
            path = folder / part / f"toy-{number}.png"
            write_atomic(path, data.getvalue())
            write_atomic(path.with_suffix(".txt"), caption(position, background) + "\n")


def write_subjects(folder: Path, names: Iterable[str]) -> None:
    """`write_subject` of each name into a folder of its own."""
    for name in names:
        write_subject(name, folder / name)


if __name__ == "__main__":
    write_subjects(Path(sys.argv[1]), TOYS)
