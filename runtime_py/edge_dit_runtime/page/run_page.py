"""run.html: how far a run is, its losses, gradients and previews."""

from __future__ import annotations

import time
from html import escape
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_dit_runtime.page import chart, previews
from edge_dit_runtime.page.chart import Chart, Curve, drawn
from edge_dit_runtime.page.html import document, facts
from edge_dit_runtime.step_log import RECENT, Level, StepLog, smoothed

if TYPE_CHECKING:
    from edge_dit_runtime.run_folder import Run

PAGE = "run.html"
RELOAD = 10
"""Seconds after which a browser reads the page of a run that trains again."""
NAMED = 8
"""Most skipped steps that are named."""
STYLE = """
dl { grid-template-columns: repeat(auto-fill, minmax(min(45%, 15rem), 1fr)); }
progress { width: 100%; height: .6rem; accent-color: var(--role-2); }
"""


def run_page(folder: Path, run: Run, log: StepLog, trains: bool) -> str:
    """The page.

    Args:
        folder: of the run; its previews are shown.
        run: what it trains.
        log: its steps.
        trains: whether it goes on.
    """
    done = len(log)
    bar = f'<progress max="{run.steps}" value="{done}">{done} of {run.steps}</progress>'
    lead = f'<p class="lead">{escape(state(run, log, trains))}</p>\n{bar}'
    sections = [
        facts(_facts(run, log)),
        _skipped(log),
        f'<div class="charts">{loss_chart(log)}</div>',
        f'<div class="charts">{level_chart(log)}\n{norm_chart(log)}</div>',
    ]
    if rows := previews.read_previews(folder):
        sheet = f'<p class="note"><a href="{previews.SHEET}">All on one sheet</a></p>'
        sections += ["<h2>Previews</h2>", *map(previews.growth, rows), sheet]
    now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    sections.append(f'<p class="note">Written {now} UTC.</p>')
    return document(
        f"Run {folder.resolve().name}",
        lead,
        "\n".join(section for section in sections if section),
        chart.STYLE + previews.STYLE + STYLE,
        RELOAD if trains else 0,
    )


def state(run: Run, log: StepLog, trains: bool) -> str:
    """How far a run is, in words."""
    far = f"{len(log)} of {run.steps} steps"
    if len(log) >= run.steps:
        return f"Done: {far}."
    if not trains:
        return f"Stopped: {far}."
    left = (run.steps - len(log)) * log.pace
    return f"Training: {far}" + (f", about {duration(left)} left." if isfinite(left) else ".")


def duration(seconds: float) -> str:
    """A time for people: "40 s", "5 min", "2 h 10 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    hours, rest = divmod(minutes, 60)
    return f"{minutes} min" if hours == 0 else f"{hours} h {rest} min"


def number(value: float, unit: str = "") -> str:
    """A number for people; a dash where it is not known."""
    return f"{value:.3g}{unit}" if isfinite(value) else "–"


def _facts(run: Run, log: StepLog) -> dict[str, str]:
    norms = [norm for norm in log.grad_norms[-RECENT:] if isfinite(norm)]
    return {
        f"Loss, mean of the last {min(RECENT, max(1, len(log)))} steps": number(log.recent),
        "Gradient norm, of the same steps": number(
            float(np.mean(norms)) if norms else float("nan")
        ),
        "Learning rate": number(log.lrs[-1] if log.lrs else float("nan")),
        "Time of a step": number(log.pace, " s"),
        "Skipped steps": str(len(log.skipped)),
        "Target": f"{run.target}, {run.layout}",
        "LoRA": f"rank {run.rank}, alpha {run.alpha:g}, for {run.base_model}",
        "Bundle and draws": f"{run.bundle}, {run.bank}",
    }


def _skipped(log: StepLog) -> str:
    """Which steps were skipped, as HTML."""
    if not (skipped := log.skipped):
        return ""
    named = ", ".join(f"{step} (draw {log.draws[step]})" for step in skipped[:NAMED])
    more = f" and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
    return (
        f"<p>Loss or gradients were not finite, so these steps changed nothing: {named}{more}.</p>"
    )


def loss_chart(log: StepLog) -> str:
    """Every step's loss, and the running mean."""
    return drawn(Chart("Loss", "step", _steps(log.losses, 0), True, (log.skipped, "skipped")))


def _steps(values: list[float], colour: int) -> list[Curve]:
    """A value of every step, and the running mean if it is one."""
    ends, means, window = smoothed(values)
    if window == 1:
        return [Curve("each step", ends, means, colour)]
    each = Curve("each step", range(len(values)), values, colour, "dots")
    return [each, Curve(f"mean of {window} steps", ends, means, colour)]


def level_chart(log: StepLog) -> str:
    """Loss by noise level, of the first steps and of the last."""
    both = zip(("first", "last"), log.by_level(), (1, 0), strict=True)
    curves = [level_curve(f"{name} {_count(part)} steps", part, n) for name, part, n in both]
    return drawn(Chart("Loss by noise level", "sigma", curves, x_range=(0.0, 1.0)))


def level_curve(name: str, levels: list[Level], colour: int) -> Curve:
    """Mean losses over the middles of the noise levels."""
    return Curve(name, [x.middle for x in levels], [x.loss for x in levels], colour, "points")


def _count(levels: list[Level]) -> int:
    return sum(level.steps for level in levels)


def norm_chart(log: StepLog) -> str:
    """Every step's gradient norm, and the running mean."""
    unknown = "Not known: these steps were logged by another version or another runtime."
    curves = _steps(log.grad_norms, 2)
    return drawn(Chart("Gradient norm", "step", curves, True, empty=unknown))
