"""Do loss masks keep the background out of what is learned?

    python samples/reproduce/masks.py WORK docs/results

tiny-sana learns a toy whose eight pictures are all on one background that no caption names, once
with a mask of the toy beside each picture and once without; the job is samples/sana.toml's, without
the loop. Then each adapter draws 16 pictures by the stock pipeline: four other backgrounds, by
prompt, from four seeds each. Writes masks.json and a contact sheet for each.

A picture counts where the toy is seen on the prompted background. The background is measured: of
the named colours, the prompted one is the closest to the mean of the picture's outermost four
pixels. Whether the toy is on it is for eyes, and goes into docs/method.md with the count.

The criterion, fixed before the first run: at least 12 of the 16 pictures count with masks, and
fewer without than with.
"""

from __future__ import annotations

import io
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1]))

from subjects import TOYS, cut_out, on_background

import edge_dit as ed
import edge_dit_runtime as er
from edge_dit.models.pipeline import load_pipeline
from edge_dit.pictures import sheet
from edge_dit.pictures.images import write_picture
from edge_dit.planning.plan import model_of
from edge_dit.reference.evaluate import adapted
from edge_dit.store.files import write_atomic, write_json
from make_subject import TRAIN
from scenes import BACKGROUNDS

SAMPLES = Path(__file__).resolve().parents[1]
TOY, LEARNED_ON, PROMPTED = "owl", "pink", ("green", "white", "yellow", "gray")
SEEDS, EDGE = [1, 2, 3, 4], 4
ARMS = {"with masks": True, "without masks": False}


def png(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


def write_pictures(folder: Path, masked: bool) -> None:
    """The toy at the places of samples/subject, all on one background."""
    rng = np.random.default_rng(zlib.crc32(TOY.encode()))
    for number, (position, _) in enumerate(TRAIN):
        toy, path = cut_out(TOYS[TOY], position, rng), folder / f"toy-{number}.png"
        picture = on_background(toy, LEARNED_ON)
        write_atomic(path, png(picture))
        write_atomic(path.with_suffix(".txt"), f"a large sks toy {position}\n")
        if masked:
            mask = toy.getchannel("A").resize(picture.size, Image.Resampling.BOX)
            write_atomic(path.with_suffix(".mask.png"), png(mask))


def write_job(folder: Path) -> Path:
    """samples/sana.toml on these pictures, for one target and without the loop."""
    text = (SAMPLES / "sana.toml").read_text()
    text = text[: text.index("[export]")] + '[export]\ntargets = ["onnx"]\n'
    for old, new in {
        'path = "tiny-sana"': f"path = {json.dumps(str(SAMPLES / 'tiny-sana'))}",
        'images = "subject/train"': 'images = "pictures"',
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    write_atomic(folder / "job.toml", text)
    return folder / "job.toml"


def trained(folder: Path, masked: bool) -> tuple[ed.Plan, Path]:
    """An arm's plan and LoRA; what is there is not made again."""
    write_pictures(folder / "pictures", masked)
    job = ed.read_job(write_job(folder))
    plan = ed.plan(job)
    if not (folder / "lora").is_dir():
        ed.precompute(plan, ed.read_pictures(job, plan), folder / "bank")
        ed.export(plan, folder / "bundle", ["onnx"])
        er.train(folder / "bundle", folder / "bank", folder / "run")
        er.save_lora(folder / "run", folder / "lora")
    return plan, folder / "lora"


def background_of(picture: np.ndarray) -> str:
    """Name of the colour that is closest to the mean of a picture's edge; uint8 [H, W, 3]."""
    inner = np.ones(picture.shape[:2], bool)
    inner[EDGE:-EDGE, EDGE:-EDGE] = False
    mean = picture[inner].mean(0)
    return min(BACKGROUNDS, key=lambda name: float(np.square(mean - BACKGROUNDS[name]).sum()))


def drawn(plan: ed.Plan, lora: Path | None, out: Path, title: str) -> dict[str, list[str]]:
    """Draw the sheet; the background of each picture, by the prompted one."""
    model = model_of(plan)
    pipeline = load_pipeline(model.folder, variant=model.variant)
    rows, found = {}, {}
    with adapted(pipeline, lora):
        for background in PROMPTED:
            prompt = f"a large sks toy in the middle on a {background} background"
            pictures = model.family.sample(pipeline, prompt, plan.s_max, SEEDS)
            rows[prompt] = [np.asarray(picture) for picture in pictures]
            found[background] = [background_of(picture) for picture in rows[prompt]]
    write_picture(out, sheet.contact_sheet(title, rows))
    return found


def main(work: Path, out: Path) -> None:
    facts: dict[str, Any] = {"toy": TOY, "learned_on": LEARNED_ON, "seeds": SEEDS, "arms": {}}
    for title, masked in ARMS.items():
        name = title.replace(" ", "-")
        plan, lora = trained((work / name).resolve(), masked)
        found = drawn(plan, lora, out / f"masks-{title.split()[0]}.png", title)
        right = sum(name == of for of, names in found.items() for name in names)
        facts["arms"][title] = {"backgrounds": found, "on the prompted one": right}
        print(f"{title}: {right} of {len(PROMPTED) * len(SEEDS)} on the prompted background")
    write_json(out / "masks.json", facts)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
