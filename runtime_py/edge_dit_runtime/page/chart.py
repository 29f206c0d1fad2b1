"""Curves as inline SVG.

The drawing is stretched to the width that there is, while lines keep their width and labels, which
are HTML around it, their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

SIDE = 1000
"""Width and height of the drawing in its own units."""
MOST_DOTS = 1500
"""Single values that a drawing has at most; of more every so manieth is drawn."""
COLOURS, DASHES = 5, ("", "6 4", "2 3")
"""Lines of the same colour are dashed differently."""
STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.5rem 2.5rem; margin: 1.5rem 0; }
.chart figcaption { font-weight: 600; margin-bottom: .5rem; }
.plot { display: grid; grid-template: 15rem 1.4rem / 3rem minmax(0, 1fr); column-gap: .4rem; }
.plot svg { width: 100%; height: 100%; border: solid var(--line); border-width: 0 0 1px 1px; }
.plot path { fill: none; vector-effect: non-scaling-stroke; }
.plot .grid { stroke: var(--line); stroke-width: .6; }
.plot .line { stroke-width: 2; stroke-linejoin: round; }
.plot .dots { stroke-width: 3; stroke-linecap: round; opacity: .35; }
.plot .points { stroke-width: 8; stroke-linecap: round; }
.plot .marks { stroke: var(--own); stroke-width: 1.5; }
.ticks { position: relative; color: var(--soft); font-size: .8rem; line-height: 1; }
.ticks span { position: absolute; white-space: nowrap; }
.ticks.y span { right: 0; transform: translateY(50%); }
.ticks.x { grid-column: 2; }
.ticks.x span { top: .35rem; transform: translateX(-50%); }
.ticks.x span:first-child { transform: translateX(-20%); }
.ticks.x span:last-child { transform: translateX(-80%); }
.chart .axis { margin: 0; text-align: right; max-width: none; color: var(--soft);
  font-size: .8rem; }
.legend svg { width: 1.8rem; height: .7rem; flex: none; }
.legend svg path { fill: none; stroke-width: 2.5; }
.legend .dots { stroke-width: 4; stroke-linecap: round; opacity: .6; }
.legend .marks { stroke: var(--own); }
""" + "".join(f".colour-{n} {{ stroke: var(--role-{n}); }}\n" for n in range(COLOURS))


@dataclass(frozen=True)
class Curve:
    """A curve of a `Chart`.

    Attributes:
        name: for the legend; "" leaves it out.
        xs, ys: of its points; those that are not finite are left out.
        number: of its colour and dashes.
        kind: "line", "dots" for single values, or "points" for a line that shows its points.
    """

    name: str
    xs: Sequence[float] | np.ndarray
    ys: Sequence[float] | np.ndarray
    number: int = 0
    kind: str = "line"


@dataclass(frozen=True)
class Chart:
    """A drawing with curves over each other.

    Attributes:
        title: above it.
        x: what its x axis shows.
        curves: drawn in this order.
        logarithmic: whether equal ratios of y are equally high. Values below the smallest positive
            one are left out.
        marks: x of places that are marked at the foot, and what they are.
        x_range: of the drawing; default that of the curves.
        empty: said where no curve has a point.
    """

    title: str
    x: str
    curves: Sequence[Curve]
    logarithmic: bool = False
    marks: tuple[Sequence[float], str] = ((), "")
    x_range: tuple[float, float] | None = None
    empty: str = field(default="Nothing to show yet.")


def drawn(chart: Chart) -> str:
    """A chart as HTML."""
    curves = [_finite(curve, chart.logarithmic) for curve in chart.curves]
    xs, ys = (np.concatenate([c[i] for c in curves] or [np.zeros(0)]) for i in (0, 1))
    title = f"<figcaption>{escape(chart.title)}</figcaption>"
    if not len(xs):
        return f'<figure class="chart">{title}<p class="note">{escape(chart.empty)}</p></figure>'
    left, right = chart.x_range or _range(float(xs.min()), float(xs.max()), 0.0)
    low, high = _range(float(ys.min()), float(ys.max()), 0.06)

    def place(x: np.ndarray, y: np.ndarray) -> list[tuple[str, str]]:
        across, up = (x - left) / (right - left), (y - low) / (high - low)
        return [
            (f"{SIDE * a:.1f}", f"{SIDE * (1 - u):.1f}") for a, u in zip(across, up, strict=True)
        ]

    x_ticks = ticks(left, right)
    y_ticks = _log_ticks(low, high) if chart.logarithmic else ticks(low, high)
    y_places = np.log10(y_ticks) if chart.logarithmic else np.array(y_ticks)
    levels = [f"M0 {y}h{SIDE}" for _, y in place(np.full(len(y_places), left), y_places)]
    paths = [f'<path class="grid" d="{"".join(levels)}"/>']
    for curve, points in zip(chart.curves, curves, strict=True):
        paths += _paths(curve, place(*points))
    if len(chart.marks[0]):
        at = place(np.asarray(chart.marks[0], float), np.full(len(chart.marks[0]), low))
        paths.append(f'<path class="marks" d="{"".join(f"M{x} {y}v-45" for x, y in at)}"/>')
    y_labels = "".join(
        f'<span style="bottom:{100 * (y - low) / (high - low):.2f}%">{tick:g}</span>'
        for tick, y in zip(y_ticks, y_places, strict=True)
    )
    x_labels = "".join(
        f'<span style="left:{100 * (tick - left) / (right - left):.2f}%">{tick:g}</span>'
        for tick in x_ticks
    )
    return "\n".join(
        [
            f'<figure class="chart">{title}',
            f'<div class="plot"><div class="ticks y">{y_labels}</div>',
            f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(chart.title)}">',
            *paths,
            f'</svg><div class="ticks x">{x_labels}</div></div>',
            f'<p class="axis">{escape(chart.x)}</p>',
            _legend(chart),
            "</figure>",
        ]
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers in [low, high], about so many: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough)
    first = np.ceil(low / step - 1e-9)
    count = int(np.floor(high / step - first + 1e-9)) + 1
    return [float(f"{(first + n) * step:.12g}") for n in range(count)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers in [10^low, 10^high]."""
    powers = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    digits = (1,) if high - low > 3 else (1, 2, 5)
    found = [d * 10.0**p for p in powers for d in digits if low <= np.log10(d * 10.0**p) <= high]
    if len(found) >= 3:
        return found[:: max(1, len(found) // 6)]
    return [tick for tick in ticks(10**low, 10**high, 6) if tick > 0]


def _range(low: float, high: float, margin: float) -> tuple[float, float]:
    """A range with room at both ends, never empty."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        room = 0.05 * abs(low) or 0.5
        return low - room, high + room
    return low - margin * (high - low), high + margin * (high - low)


def _finite(curve: Curve, logarithmic: bool) -> tuple[np.ndarray, np.ndarray]:
    """Finite points of a curve, y as its logarithm where ``logarithmic``; at most `MOST_DOTS`."""
    xs, ys = np.asarray(curve.xs, np.float64), np.asarray(curve.ys, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        ys = np.log10(ys) if logarithmic else ys
    kept = np.flatnonzero(np.isfinite(xs) & np.isfinite(ys))
    kept = kept[:: max(1, -(-len(kept) // MOST_DOTS))]
    return xs[kept], ys[kept]


def _paths(curve: Curve, at: list[tuple[str, str]]) -> list[str]:
    colour = f"colour-{curve.number % COLOURS}"
    round_ones = "".join(f"M{x} {y}h0" for x, y in at)  # lines without length, with round ends
    if curve.kind == "dots":
        return [f'<path class="dots {colour}" d="{round_ones}"/>']
    line = "L".join(f"{x} {y}" for x, y in at)
    paths = [f'<path class="line {colour}"{_dashes(curve)} d="M{line}"/>'] if at else []
    if curve.kind == "points" or len(at) == 1:
        paths.append(f'<path class="points {colour}" d="{round_ones}"/>')
    return paths


def _dashes(curve: Curve) -> str:
    dashes = DASHES[curve.number // COLOURS % len(DASHES)]
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def _legend(chart: Chart) -> str:
    samples = [
        (f"colour-{c.number % COLOURS}", c.kind == "dots", _dashes(c), c.name)
        for c in chart.curves
        if c.name
    ]
    if len(chart.marks[0]):
        samples.append(("marks", False, "", chart.marks[1]))
    rows = []
    for style, dots, dashes, name in samples:
        line = "M14 0v10" if style == "marks" else "M4 5h0M14 3h0M24 7h0" if dots else "M0 5h28"
        kind = "dots " if dots else ""
        rows.append(
            f'<li><svg viewBox="0 0 28 10" aria-hidden="true"><path class="{kind}{style}"{dashes} '
            f'd="{line}"/></svg>{escape(name)}</li>'
        )
    return f'<ul class="legend">{"".join(rows)}</ul>' if rows else ""
