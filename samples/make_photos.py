"""Cut samples/photos from the photographs that come with scikit-image, captions beside them.

    python samples/make_photos.py

The pictures: Chelsea the cat (CC0, Stefan van der Walt), a cup of coffee (CC0, Rachel Michetti), a
rocket (public domain, SpaceX).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

PHOTOS = (  # name, picture, caption, left, top, side (pixels)
    ("cat-face", data.chelsea, "a photo of a sks cat", 60, 0, 300),
    ("cat-eyes", data.chelsea, "a photo of the eyes of a sks cat", 100, 20, 256),
    ("cat-left", data.chelsea, "a photo of a sks cat at the left", 151, 0, 300),
    ("cat-right", data.chelsea, "a photo of a sks cat at the right", 0, 0, 300),
    ("coffee", data.coffee, "a photo of a cup of coffee", 130, 0, 400),
    ("rocket", data.rocket, "a photo of a rocket", 110, 0, 427),
)


def main() -> None:
    root = Path(__file__).parent / "photos"
    root.mkdir(exist_ok=True)
    for name, picture, caption, left, top, side in PHOTOS:
        square = Image.fromarray(np.asarray(picture())[top : top + side, left : left + side])
        assert square.size == (side, side), f"{name}: the crop leaves the photograph"
        square.resize((256, 256), Image.LANCZOS).save(root / f"{name}.jpg", quality=92)
        (root / f"{name}.txt").write_text(caption + "\n")


if __name__ == "__main__":
    main()
