"""From runs to tables, claims and figures.

Where a table says "mean ± standard error", it is over runs, one for each subject and seed. Claims
are about differences within the same subject and seed, and judged on the held-out flow-matching
loss; the other measures stand beside it. What was not run is said to be missing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from arms import ARMS, CLAIMS, NO_LORA, PAST, SHARE_CLAIM, Claim
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from edge_dit.store.files import write_atomic, write_json

LOSS = "heldout_loss"
MEASURES = {LOSS: 1, "similarity": -1, "adherence": -1}
"""A measure -> the sign of "worse"."""
FULL = SHARE_CLAIM[1]
HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided"
Results = dict[str, dict[tuple[str, int], dict[str, Any]]]
"""Arm -> (subject, seed) -> what `experiment.execute` measured."""


def collect(names: Sequence[str], folder: Path) -> Results:
    """The runs of these names whose files are in ``folder``."""
    found: Results = {}
    for name in names:
        file = folder / f"{name}.json"
        if file.is_file():
            run = json.loads(file.read_text())
            found.setdefault(run["arm"], {})[run["subject"], run["seed"]] = run
    return found


def read_results(path: Path) -> Results:
    """The runs of a results.json, each with its arm's settings."""
    kept = json.loads(path.read_text())
    found: Results = {}
    for run in kept["runs"]:
        whole = {**run, "settings": kept["arms"][run["arm"]]}
        found.setdefault(run["arm"], {})[run["subject"], run["seed"]] = whole
    return found


# ---------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Mean:
    """Mean of ``count`` numbers and its standard error, None when there is only one."""

    mean: float
    error: float | None
    count: int

    def __str__(self) -> str:
        digits = 4 if abs(self.mean) < 1 else 3
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{self.mean:.{digits}f}{error}"


def mean_of(values: Sequence[float]) -> Mean:
    count = len(values)
    error = float(np.std(values, ddof=1)) / count**0.5 if count > 1 else None
    return Mean(float(np.mean(values)), error, count)


def measured(results: Results, arm: str, measure: str) -> Mean:
    return mean_of([run[measure] for run in results[arm].values()])


def gain(results: Results, better: str, worse: str, measure: str) -> Mean | None:
    """By how much ``better`` beats ``worse``, over the subjects and seeds that both have."""
    ours, theirs = results.get(better, {}), results.get(worse, {})
    both = [key for key in ours if key in theirs]
    sign = MEASURES[measure]
    differences = [sign * (theirs[key][measure] - ours[key][measure]) for key in both]
    return mean_of(differences) if both else None


def share_of_full(results: Results, arm: str) -> Mean | None:
    """The arm's improvement of held-out loss over the base model, in full LoRA's improvements."""
    of = [results.get(name, {}) for name in (arm, NO_LORA, FULL)]
    both = [key for key in of[0] if all(key in runs for runs in of)]
    losses = [[runs[key][LOSS] for runs in of] for key in both]
    return mean_of([(base - ours) / (base - full) for ours, base, full in losses]) if both else None


def beats(difference: Mean | None, margin: float) -> str:
    """Whether ``difference`` is more than ``margin`` standard errors, or not below 0 if that is 0.
    Not decided without a pair, nor by one pair when it takes standard errors.
    """
    if difference is None:
        return OPEN
    if margin == 0:
        return HOLDS if difference.mean >= 0 else FAILS
    if difference.error is None:
        return OPEN
    return HOLDS if difference.mean > margin * difference.error else FAILS


def all_of(verdicts: Sequence[str]) -> str:
    """Of a claim, from its pairs: one that fails is enough."""
    return next((word for word in (FAILS, OPEN) if word in verdicts), HOLDS)


def judge(results: Results, claim: Claim) -> str:
    """By the pairs of a claim; by those that were run, of arms that not every model proposes."""
    pairs = [p for p in claim.pairs if ARMS[p[0]].where != "proposed" or p[0] in results]
    verdicts = [beats(gain(results, *pair, LOSS), claim.margin) for pair in pairs]
    return all_of(verdicts) if verdicts else OPEN


def judge_share(results: Results) -> str:
    arm, _, least = SHARE_CLAIM
    share = share_of_full(results, arm)
    if share is None:
        return OPEN
    return HOLDS if share.mean >= least else FAILS


# ---------------------------------------------------------------- tables


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def shown(value: Mean | None) -> str:
    return "missing" if value is None else str(value)


def percent(share: Mean | None) -> str:
    if share is None:
        return "missing"
    error = "" if share.error is None else f" ± {100 * share.error:.1f}"
    return f"{100 * share.mean:.1f}{error} %"


def ranges(blocks: Sequence[int]) -> str:
    """Ascending numbers as "0-3, 8-11"."""
    starts = [b for b in blocks if b - 1 not in blocks]
    ends = [b for b in blocks if b + 1 not in blocks]
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True))


def arms_table(results: Results) -> str:
    rows = []
    for name, runs in results.items():
        arm, setting = ARMS[name], next(iter(runs.values()))["settings"]
        rows.append(
            [
                f"`{name}`",
                arm.title,
                arm.source,
                "-" if name == NO_LORA else ranges(setting["blocks"]),
                *(measured(results, name, measure) for measure in MEASURES),
                "-" if name == NO_LORA else percent(share_of_full(results, name)),
                len(runs),
            ]
        )
    head = ["arm", "", "paper", "LoRA in blocks", "held-out loss", "similarity", "adherence"]
    return table([*head, "share of full LoRA", "runs"], rows)


def claims_table(results: Results) -> str:
    rows = []
    for claim in CLAIMS:
        rule = f"must exceed {claim.margin:g} errors" if claim.margin else "must not be below 0"
        verdict = f"**{judge(results, claim)}**"
        rows.append([f"**{claim.says}**", claim.source, rule, *[""] * 3, verdict])
        for pair in claim.pairs:
            better = gain(results, *pair, LOSS)
            rows.append(
                [
                    "`{}` against `{}`".format(*pair),
                    "",
                    *(shown(gain(results, *pair, measure)) for measure in MEASURES),
                    better.count if better else 0,
                    beats(better, claim.margin),
                ]
            )
    gains = [f"{name} gained" for name in ("held-out loss", "similarity", "adherence")]
    return table(["claim", "paper", *gains, "pairs", ""], rows)


def wins(results: Results, arm: str, other: str) -> str:
    """Whether an arm past the paper wins: its loss is lower by more than two standard errors, and
    its similarity not lower by more than two.
    """
    loss, similar = (gain(results, arm, other, measure) for measure in (LOSS, "similarity"))
    if loss is None or similar is None or loss.error is None or similar.error is None:
        return OPEN
    better = loss.mean > 2 * loss.error and similar.mean >= -2 * similar.error
    return "wins" if better else "does not win"


def past_table(results: Results) -> str:
    """The arms past the paper that were run, against those that they are compared with."""
    rows = [
        [
            f"`{arm}`",
            f"`{other}`",
            *(shown(gain(results, arm, other, measure)) for measure in (LOSS, "similarity")),
            wins(results, arm, other),
            percent(share_of_full(results, arm)),
        ]
        for arm, other in PAST.items()
        if arm in results and other in results
    ]
    head = ["arm", "against", "held-out loss gained", "similarity gained", "", "share of full LoRA"]
    return table(head, rows)


def share_sentence(results: Results) -> str:
    arm, full, least = SHARE_CLAIM
    share = share_of_full(results, arm)
    return (
        f"**`{arm}` improves on the base model by at least {100 * least:.0f} % of what `{full}` "
        f"does: {judge_share(results)}** - {percent(share)}.\n"
    )


def report(results: Results, name: str, selected: str) -> str:
    """The whole of results.md.

    Args:
        results: what there is.
        name: of the model.
        selected: how its blocks were selected, a sentence.
    """
    absent = [f"`{arm}`" for arm in ARMS if arm not in results]
    some = [run for runs in results.values() for run in runs.values()]
    toys, seeds = ({run[key] for run in some} for key in ("subject", "seed"))
    steps = {str(run["settings"]["steps"]) for run in some}
    parts = [
        f"# {name}: {len(toys)} subjects, {len(seeds)} seeds, {', '.join(sorted(steps))} steps\n",
        "Mean ± standard error over runs, one for each subject and seed. Held-out loss: lower is "
        f"better; similarity and adherence: higher is better. {selected}\n",
        "## Claims\n",
        "A gain is the first arm's over the second's, positive when the first is better, within "
        "the same subject and seed. Verdicts are by held-out loss alone.\n",
        claims_table(results),
        share_sentence(results),
        "## Past the paper\n",
        "An arm wins if its held-out loss is lower by more than two standard errors, and its "
        "similarity not lower by more than two.\n",
        past_table(results),
        "## Arms\n",
        arms_table(results),
    ]
    return "\n".join([*parts, *([f"Not run: {', '.join(absent)}.\n"] if absent else [])])


def as_json(results: Results) -> dict[str, Any]:
    """Every run's numbers, and once an arm's settings."""
    runs = [run for arm in results.values() for run in arm.values()]
    settings = {arm: next(iter(runs.values()))["settings"] for arm, runs in results.items()}
    kept = ("arm", "subject", "seed", *MEASURES, "train_loss", "seconds")
    return {
        "claims": {claim.says: judge(results, claim) for claim in CLAIMS},
        "share": {**_share_json(results), "verdict": judge_share(results)},
        "past": {
            arm: wins(results, arm, other)
            for arm, other in PAST.items()
            if arm in results and other in results
        },
        "arms": {arm: shared(setting) for arm, setting in settings.items()},
        "runs": [{key: run.get(key) for key in kept} for run in runs],
    }


def shared(settings: dict[str, Any]) -> dict[str, Any]:
    """Of a run's settings those that all runs of its arm have."""
    return {key: value for key, value in settings.items() if key not in ("images", "seed")}


def _share_json(results: Results) -> dict[str, Any]:
    arm, full, least = SHARE_CLAIM
    share = share_of_full(results, arm)
    return {"arm": arm, "of": full, "at_least": least, **({} if share is None else asdict(share))}


# ---------------------------------------------------------------- figures

COLOURS = {
    "all blocks carry LoRA": "tab:blue",
    "skipped, residuals": "tab:green",
    "skipped, no residuals": "tab:red",
    "half of the blocks carry LoRA": "tab:purple",
    "not trained": "black",
}
COLUMNS = 3  # of the picture of pictures


def kind(name: str) -> str:
    """One of `COLOURS`."""
    if name == NO_LORA:
        return "not trained"
    if not ARMS[name].skipped:
        return "all blocks carry LoRA"
    return {
        "residual": "skipped, residuals",
        "nothing": "skipped, no residuals",
        "blocks": "half of the blocks carry LoRA",
    }[ARMS[name].stand_in]


def figure(path: Path, width: float, height: float, draw: Callable[[Axes], None]) -> None:
    """Draw one plot and write it as PNG."""
    canvas, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    save(canvas, path)


def save(canvas: Figure, path: Path) -> None:
    """As a PNG of 256 colours, a third of what it would be with all."""
    drawn, small = io.BytesIO(), io.BytesIO()
    canvas.savefig(drawn, format="png", dpi=100)
    plt.close(canvas)
    Image.open(drawn).convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    write_atomic(path, small.getvalue())


def legend(axes: Axes, names: Iterable[str], **options: Any) -> None:
    kinds = {kind(name) for name in names}
    marks = {k: Line2D([], [], color=c, marker="o", ls="") for k, c in COLOURS.items()}
    axes.legend(
        [m for k, m in marks.items() if k in kinds], [k for k in marks if k in kinds], **options
    )


def draw_losses(axes: Axes, results: Results) -> None:
    """Mean held-out loss of each arm; small dots are runs."""
    names = sorted(results, key=lambda name: -measured(results, name, LOSS).mean)
    for row, name in enumerate(names):
        loss, colour = measured(results, name, LOSS), COLOURS[kind(name)]
        toys = sorted({toy for toy, _ in results[name]})
        means = [
            np.mean([r[LOSS] for k, r in results[name].items() if k[0] == toy]) for toy in toys
        ]
        axes.plot(means, [row] * len(toys), ".", color=colour, alpha=0.35)
        axes.errorbar(loss.mean, row, xerr=loss.error, fmt="o", color=colour, capsize=3)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-1, len(names))
    axes.set_xlabel("held-out flow-matching loss: mean ± standard error; dots: toys")
    legend(axes, names, loc="upper right")


def draw_pictures(results: Results, folder: Path) -> Figure:
    """What each arm draws of the first subject with its first seed, and the real pictures."""
    toy, seed = min(key for runs in results.values() for key in runs)
    pictures = {
        name: folder / "runs" / f"{name}-{toy}-{seed}.png"
        for name, runs in results.items()
        if (toy, seed) in runs and (folder / "runs" / f"{name}-{toy}-{seed}.png").is_file()
    }
    real = sorted((folder / "subjects" / toy / "heldout").glob("*.png"))
    strips = {
        "real, held out": np.hstack([np.asarray(Image.open(path)) for path in real]),
        **{title: np.asarray(Image.open(path)) for title, path in pictures.items()},
    }
    rows = -(-len(strips) // COLUMNS)
    canvas, grid = plt.subplots(
        rows, COLUMNS, figsize=(11, 1.05 * rows), layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, (title, strip) in zip(grid.flat, strips.items(), strict=False):
        axes.imshow(strip)
        axes.set_title(title, size=8)
    return canvas


def write_results(results: Results, folder: Path, selected: str) -> None:
    """Write results.json, results.md and the figures into ``folder``, which has runs/ and
    subjects/ as run.py leaves them; ``selected``: see `report`.
    """
    write_json(folder / "results.json", as_json(results))
    write_atomic(folder / "results.md", report(results, folder.name, selected))
    height = 1.5 + 0.22 * len(results)
    figure(folder / "losses.png", 9, height, lambda axes: draw_losses(axes, results))
    save(draw_pictures(results, folder), folder / "pictures.png")
