"""Measure the loop's stages on the device: pictures to bank, training, pictures painted.

The model is a whole public configuration with random weights, half of its blocks trained, with the
autoencoder it is published with. Each stage is a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_dit.app.bench.bench import bytes_in, run_task
from edge_dit.app.bench.loop_tasks import DC_AE, STAGES, LoopExport, LoopStage
from edge_dit.app.bench.machine import Machine, busy_warning, this_machine
from edge_dit.app.bench.model import MODEL, Case, random_model
from edge_dit.contract.names import TAILS
from edge_dit.contract.targets import STREAMED, TargetVariant
from edge_dit.errors import BadInput
from edge_dit.models.families import family_of
from edge_dit.models.public_configs import public_config
from edge_dit.pictures.images import write_picture
from edge_dit.store.files import write_json
from edge_dit.text import columns

DRAWS = 4
"""Draws of the bank."""


@dataclass(frozen=True)
class LoopRow:
    """What one stage takes.

    Attributes:
        stage: "collect" (a draw), "train" (a step from a bank), "live" (a step from pictures, the
            mean of those that encode a crop and those that do not), "paint" (a picture).
        dtype: how blocks are stored.
        seconds: of one.
        rss_anon_mb: peak of anonymous memory, MB.
        rss_file_mb: peak of pages of files, MB.
    """

    stage: str
    dtype: str
    seconds: float
    rss_anon_mb: float
    rss_file_mb: float


@dataclass(frozen=True)
class LoopReport:
    """One run; ``dataclasses.asdict`` of it is what ``edge-dit bench --loop -o`` writes.

    Attributes:
        config: name of the public configuration.
        machine: where and when.
        side: of patches and pictures, pixels.
        export_s: seconds of the export.
        export_rss_mb: its memory, MB.
        bundle_bytes: of the bundle.
        rows: one for each stage.
    """

    config: str
    machine: Machine
    side: int
    export_s: float
    export_rss_mb: float
    bundle_bytes: int
    rows: list[LoopRow]


def bench_loop(
    case: Case,
    variants: Sequence[TargetVariant],
    tail: str,
    work: Path,
    say: Callable[[str], None],
) -> LoopReport:
    """Measure every stage.

    Args:
        case: its configuration, sizes and steps; all blocks of the configuration are there.
        variants: one of the streamed layout, whose dtype the blocks are stored as; none for int8.
        tail: what takes the place of skipped last blocks, see `edge_dit.planning.job`.
        work: folder for model and bundles; a later run of the same case uses them again.
        say: prints a line of progress.

    Raises:
        BadInput: sizes that do not fit the configuration, or something is not installed.
        CheckFailed: a process failed.
    """
    chosen = list(variants) or [TargetVariant("onnx", STREAMED, "int8")]
    if len(chosen) > 1 or chosen[0].layout != STREAMED:
        found = ", ".join(map(str, chosen))
        raise BadInput("--target", found=found, expected="one of the streamed layout, with --loop")
    if tail not in TAILS:
        raise BadInput("--tail", found=tail, expected=" or ".join(TAILS))
    dtype = chosen[0].dtype
    machine = this_machine()
    if warning := busy_warning(machine):
        say(warning)
    public = public_config(case.config)
    if public.family != "sana":
        raise BadInput("--loop", found=f"a model of {public.family}", expected="one of SANA's")
    counts = [public.config[key] for key in family_of(public.family).containers.values()]
    whole = Case(case.config, counts, case.tokens, case.text, case.rank, case.steps, False)
    plan = random_model(whole, work)
    quarter = plan.layers // 4
    changes = {"head_skip": quarter, "tail_skip": quarter, "tail": tail, "draws": DRAWS}
    plan = plan.model_copy(update={**changes, "weights": dtype, "loop": True})
    path, bundle = work / f"loop-{dtype}-{tail}.json", work / f"loop-{dtype}-{tail}"
    write_json(path, plan.model_dump(mode="json"))
    vae = {"_class_name": "AutoencoderDC", **DC_AE}
    write_json(work / MODEL / "vae" / "config.json", vae)
    _write_images(work / "images", plan.s_max)
    say("export")
    exported = run_task(LoopExport(path, work, bundle))
    rows = []
    for stage in STAGES:
        say(stage)
        done = run_task(LoopStage(stage, work, bundle, case.steps))
        seconds = done.numbers["seconds"]
        rows.append(LoopRow(stage, dtype, seconds, done.anon_mb, done.file_mb))
    return LoopReport(
        config=case.config,
        machine=machine,
        side=plan.s_max,
        export_s=exported.numbers["seconds"],
        export_rss_mb=exported.rss_mb,
        bundle_bytes=bytes_in(bundle),
        rows=rows,
    )


def _write_images(folder: Path, side: int) -> None:
    """Two pictures that are larger than a patch."""
    rng = np.random.default_rng(0)
    for number in range(2):
        pixels = rng.integers(0, 255, (side + 40, side + 90, 3), np.uint8)
        write_picture(folder / f"{number}.png", pixels)


def in_words(rows: list[LoopRow]) -> list[str]:
    """Lines of a table with a column for each stage."""
    return columns(
        [row.stage for row in rows],
        [
            ("seconds", [f"{row.seconds:.1f}" for row in rows]),
            ("anonymous, MB", [f"{row.rss_anon_mb:,.0f}" for row in rows]),
            ("of files, MB", [f"{row.rss_file_mb:,.0f}" for row in rows]),
        ],
    )
