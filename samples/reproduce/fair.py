"""Is a base fair to half-size patches? Do pictures that it draws at 64 px obey their captions as
those at 128 px do (README.md has the criterion)?

    python samples/reproduce/fair.py samples/tiny-sana -o samples/reproduce/results/tiny-sana

Writes fair.json and fair.png: eight captions, above at 128 px, below at 64 px.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1]))

from measures import adherence

from edge_dit.store.files import write_json
from grid import SETTINGS
from scenes import SIDE, random_scene, sheet

CAPTIONS, AT_ONCE = 64, 16
SIZES = (SIDE, SIDE // 2)
SEED = 64
SHOWN = 8


def drawn(pipe: Any, captions: list[str], side: int, settings: dict[str, Any]) -> list[Image.Image]:
    """A square picture of each caption."""
    pictures: list[Image.Image] = []
    for first in range(0, len(captions), AT_ONCE):
        some = captions[first : first + AT_ONCE]
        seeds = [1000 * side + first + n for n in range(len(some))]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        given = {"height": side, "width": side, "generator": generators, **settings}
        pictures += pipe(some, **given).images
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a sample checkpoint's folder")
    parser.add_argument("-o", "--out", type=Path, required=True)
    asked = parser.parse_args()
    rng = np.random.default_rng(SEED)
    scenes = [random_scene(rng) for _ in range(CAPTIONS)]
    captions = [scene.caption() for scene in scenes]
    pipe = DiffusionPipeline.from_pretrained(asked.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    settings = SETTINGS[f"tiny-{'flux' if 'Flux' in type(pipe).__name__ else 'sana'}"]
    found: dict[str, Any] = {"captions": CAPTIONS}
    pictures = {side: drawn(pipe, captions, side, settings) for side in SIZES}
    shares = {
        side: np.array(
            [
                adherence(picture, scene.position, scene.background)
                for picture, scene in zip(made, scenes, strict=True)
            ]
        )
        for side, made in pictures.items()
    }
    for side, share in shares.items():
        error = share.std(ddof=1) / CAPTIONS**0.5
        found[f"{side} px"] = {"adherence": float(share.mean()), "error": float(error)}
    large, small = (shares[side] for side in SIZES)
    error = (large.var(ddof=1) / CAPTIONS + small.var(ddof=1) / CAPTIONS) ** 0.5
    found["difference"] = {"mean": float(large.mean() - small.mean()), "error": float(error)}
    found["fair"] = bool(large.mean() - small.mean() <= 2 * error)
    asked.out.mkdir(parents=True, exist_ok=True)
    write_json(asked.out / "fair.json", found)
    cells = [np.asarray(p.resize((SIDE, SIDE))) for s in SIZES for p in pictures[s][:SHOWN]]
    sheet(cells, SHOWN).save(asked.out / "fair.png", optimize=True)
    print(found)


if __name__ == "__main__":
    main()
