"""Runs beside each other: a table, and a page with their curves over each other."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

from edge_dit.errors import BadInput
from edge_dit.store.documents import read_document
from edge_dit.text import columns
from edge_dit_runtime.page import chart, previews
from edge_dit_runtime.page.chart import Chart, Curve, drawn
from edge_dit_runtime.page.html import document, table
from edge_dit_runtime.page.previews import Row, read_previews
from edge_dit_runtime.page.run_page import level_curve, number
from edge_dit_runtime.run_folder import RUN, SETTINGS, Run, RunFolder
from edge_dit_runtime.step_log import BINS, RECENT, StepLog, read_log, smoothed

NOT_SETTINGS = ("done", "manifest_sha256", "bank_sha256")
"""Fields of a `Run` that nobody chose."""
STYLE = """
.previews { grid-template-columns: repeat(auto-fill, minmax(min(45%, 13rem), 1fr)); }
tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
"""
LONGEST = 60
"""Characters of a setting in a table."""


@dataclass(frozen=True)
class Read:
    """A run folder.

    Attributes:
        folder: its path as it was given.
        name: its number, and what its path has that those of the others have not.
        run: what it trains.
        log: its steps.
        settings: the plan of its bundle and what the command chose, flat; "optimizer.lr".
        planned: whether it wrote the plan down; other versions and runtimes do not.
    """

    folder: Path
    name: str
    run: Run
    log: StepLog
    settings: dict[str, str]
    planned: bool

    @cached_property
    def previews(self) -> list[Row]:
        """What it painted."""
        return read_previews(self.folder)


def read_runs(folders: Sequence[Path]) -> list[Read]:
    """The runs in some folders.

    Raises:
        BadInput: fewer than two, one twice, or one that is no run folder or damaged.
    """
    if len(folders) < 2:
        raise BadInput("compare", found="one run", expected="two or more run folders")
    places = [folder.resolve() for folder in folders]
    for place, folder in enumerate(folders):
        if places[place] in places[:place]:
            raise BadInput(folder, found="named twice", expected="different runs")
    shared = Path(os.path.commonpath(places))
    names = [place.relative_to(shared).as_posix() for place in places]
    return [
        _read(folder, f"[{number}] {place.name if name == '.' else name}")
        for number, (folder, place, name) in enumerate(zip(folders, places, names, strict=True), 1)
    ]


def _read(folder: Path, name: str) -> Read:
    if not (folder / RUN).is_file() and (folder / "run" / RUN).is_file():
        raise BadInput(
            folder,
            found="the folder of edge-dit run, which holds its runs",
            expected="run folders",
            remedy=f"edge-dit compare {folder / 'run'} ...",
        )
    run, path = RunFolder(folder).read(), folder / SETTINGS
    plan: dict[str, Any] = {}
    if path.is_file():
        plan = read_document(path, "a run folder", "remove it: compare goes on without")
    chosen = {k: v for k, v in asdict(run).items() if k not in NOT_SETTINGS}
    return Read(folder, name, run, read_log(folder), _flat({**plan, **chosen}), bool(plan))


def _flat(values: dict[str, Any], above: str = "") -> dict[str, str]:
    """Values as text, those of inner objects as "outer.inner"."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{above}{key}.")
        else:
            found[above + key] = value if isinstance(value, str) else json.dumps(value)
    return found


def differing(runs: Sequence[Read]) -> dict[str, list[str]]:
    """Settings that not all runs share: key -> the value of each; a dash where it is not known."""
    keys = dict.fromkeys(key for read in runs for key in read.settings)
    rows = {key: [read.settings.get(key, "–") for read in runs] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def notes(runs: Sequence[Read]) -> list[str]:
    """What stands against comparing the runs, in words; may be empty."""
    found = []
    if len({read.run.manifest_sha256 for read in runs}) > 1:
        found.append("The runs trained different bundles.")
    if len({read.run.bank_sha256 for read in runs}) > 1:
        found.append(
            "They trained on different draws: compare losses by noise level rather than step by "
            "step."
        )
    if unknown := [read.name for read in runs if not read.planned]:
        found.append(
            f"Few settings are known of {', '.join(unknown)}: another version or another runtime "
            f"wrote no {SETTINGS}."
        )
    if empty := [read.name for read in runs if not len(read.log)]:
        found.append(f"No step was saved yet in {', '.join(empty)}.")
    return found


def as_json(runs: Sequence[Read]) -> dict[str, Any]:
    """All of it for machines."""
    every = [{"folder": str(r.folder), **asdict(r.run), "log": r.log.summary()} for r in runs]
    return {"runs": every, "differ": differing(runs), "notes": notes(runs)}


def in_words(runs: Sequence[Read]) -> list[str]:
    """Lines of the tables for people."""
    lines = []
    for head, rows in (_measured(runs), _by_level(runs)):
        lines += [*columns(head[1:], [(name, cells) for name, *cells in rows]), ""]
    if differ := differing(runs):
        names = [read.name for read in runs]
        rows = [(key, [_short(value) for value in values]) for key, values in differ.items()]
        lines += ["Settings that differ:", *columns(names, rows), ""]
    else:
        lines += ["No setting differs.", ""]
    return [line.rstrip() for line in [*lines, *notes(runs)]]


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _measured(runs: Sequence[Read]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of what the runs did."""
    shortest = min(len(read.log) for read in runs)
    same = all(len(read.log) == shortest for read in runs)
    at = [] if same or not shortest else [f"at step {shortest}"]
    head = ["run", "steps", "loss", *at, "gradient norm", "learning rate", "s a step", "skipped"]
    rows = []
    for read in runs:
        log, facts = read.log, read.log.summary()
        then = [number(StepLog(losses=log.losses[:shortest]).recent)] if at else []
        cells = [_known(facts[key]) for key in ("grad_norm", "lr", "seconds_per_step")]
        done = f"{len(log)} of {read.run.steps}"
        loss = [number(log.recent), *then]
        rows.append([read.name, done, *loss, *cells, str(facts["skipped"])])
    return head, rows


def _known(value: float | None) -> str:
    return "–" if value is None else number(value)


def _by_level(runs: Sequence[Read]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of losses by noise level."""
    edges = [(place / BINS, (place + 1) / BINS) for place in range(BINS)]
    rows = []
    for read in runs:
        found = {level.low: number(level.loss) for level in read.log.by_level()[1]}
        rows.append([read.name, *(found.get(low, "–") for low, _ in edges)])
    return ["loss at sigma", *(f"{low:.3g}-{high:.3g}" for low, high in edges)], rows


def page(runs: Sequence[Read]) -> str:
    """The page."""
    lead = f'<p class="lead">{len(runs)} runs. Losses are means of the last {RECENT} steps.</p>'
    said = [f"<li>{escape(note)}</li>" for note in notes(runs)]
    sections = [f"<ul>{''.join(said)}</ul>"] if said else []
    sections.append(table("What they did", *_measured(runs)))
    sections.append(_curves("Loss, running mean", runs, [read.log.losses for read in runs]))
    levels = [
        level_curve(read.name, read.log.by_level()[1], place) for place, read in enumerate(runs)
    ]
    level_chart = Chart("Loss by noise level, last steps", "sigma", levels, x_range=(0.0, 1.0))
    norms = _curves("Gradient norm, running mean", runs, [read.log.grad_norms for read in runs])
    sections.append(f'<div class="charts">{drawn(level_chart)}\n{norms}</div>')
    sections.append(table("Loss by noise level, last steps", *_by_level(runs)))
    sections += _settings(runs)
    sections += _side_by_side(runs)
    return document(
        "Runs compared", lead, "\n".join(sections), chart.STYLE + previews.STYLE + STYLE
    )


def _curves(title: str, runs: Sequence[Read], values: Sequence[Sequence[float]]) -> str:
    """Running means over each other."""
    curves = [
        Curve(read.name, *smoothed(values[place])[:2], place)
        for place, read in enumerate(runs)
        if any(map(isfinite, values[place]))
    ]
    last = max((float(curve.xs[-1]) for curve in curves), default=0.0)
    return drawn(Chart(title, "step", curves, True, x_range=(0.0, max(1.0, last))))


def _settings(runs: Sequence[Read]) -> list[str]:
    """The settings that differ, as HTML."""
    rows = [[key, *map(_short, values)] for key, values in differing(runs).items()]
    if not rows:
        return ["<h2>Settings</h2>", "<p>No setting differs.</p>"]
    head = ["setting", *(read.name for read in runs)]
    return ["<h2>Settings</h2>", table("Those that differ", head, rows)]


def _side_by_side(runs: Sequence[Read]) -> list[str]:
    """The last preview of each run, by prompt, as HTML."""
    titles = dict.fromkeys(row.title for read in runs for row in read.previews)
    sections = ["<h2>Previews</h2>"] if titles else []
    for title in titles:
        shown = []
        for read in runs:
            for row in (row for row in read.previews if row.title == title):
                step, path = list(row.pictures.items())[-1]
                name = f"{read.name}, step {step}"
                shown.append((previews.picture(path, f"{title}: {name}"), name))
        sections.append(previews.gallery(title, shown))
    return sections
