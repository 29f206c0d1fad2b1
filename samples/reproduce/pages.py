"""Put what was measured into README.md here and docs/method.md: their tables, and one figure.

    python samples/reproduce/pages.py

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is one of `TABLES`. All are of
results/*/results.json, of memory.json and diagnosis.json beside it, and of docs/results/prior.json.
What a model was not run on is "-" where its family cannot be, and "not run" else.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from arms import ARMS, CLAIMS, MODELS, PAST, SHARE_CLAIM, Arm
from diagnose import in_words
from matplotlib import pyplot as plt
from tables import (
    LOSS,
    OPEN,
    Results,
    gain,
    judge,
    judge_share,
    measured,
    percent,
    read_results,
    save,
    share_of_full,
    shown,
    table,
    wins,
)

from edge_dit.contract.names import FRESH, STORED, TAILS, THROUGH
from edge_dit.store.files import write_atomic

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
PAGES = (HERE / "README.md", DOCS / "method.md")
MARKED = re.compile(r"(<!-- table (\S+) -->\n)(.*?)(<!-- end -->\n)", re.DOTALL)
KEPT = {
    "low-to-high": "all blocks, patches of half the side",
    "skip-30": "30 % skipped, the same patches",
    "skip-50": "50 % skipped, the same patches",
    "window-50": "50 % skipped, windows of the same size",
    "window-four-50": "the same, four draws a step",
    "best-50": "eight that hear the rest of the picture, a tail that runs, int8",
    "skip-30-large": "30 % skipped, patches of 7/8",
    "partial-50": "LoRA on half of the blocks, none skipped, full resolution",
}
"""Arms whose shares docs/method.md shows, in its words."""
PERCENTS = (30, 40, 50)
CHEAPER = {"int8": ("float32", "int8"), "lean": ("both moments", "second moment")}
"""Kind of arm -> what its table calls the usual way and it."""
ERRORS = 2
"""Standard errors within which a cheaper way is as good."""

Everything = dict[str, Results]
"""By model."""


def bold(verdict: str) -> str:
    return f"**{verdict}**"


def missing(arm: Arm, model: str) -> str:
    """What stands where an arm has no result."""
    return "not run" if arm.family in ("", MODELS[model]) else "-"


def verdicts(all_of: Everything) -> str:
    rows = [
        [claim.says, claim.source or "ours", *(bold(judge(r, claim)) for r in all_of.values())]
        for claim in CLAIMS
    ]
    arm, _, least = SHARE_CLAIM
    shares = [f"{bold(judge_share(r))}, {percent(share_of_full(r, arm))}" for r in all_of.values()]
    says = f"`{arm}` reaches {100 * least:.0f} % of full LoRA's gain"
    return table(["claim", "paper", *all_of], [*rows, [says, "Table 2", *shares]])


def kept(all_of: Everything) -> str:
    rows = [
        [
            f"{words} (`{arm}`)",
            *(percent(share_of_full(r, arm)) if arm in r else "not run" for r in all_of.values()),
        ]
        for arm, words in KEPT.items()
    ]
    return table(["", *all_of], rows)


def past(all_of: Everything) -> str:
    """Arms that were run on a model, by their share of full LoRA's gain."""
    rows = []
    for arm, other in PAST.items():
        if not any(arm in results for results in all_of.values()):
            continue
        cells: list[str] = []
        for model, results in all_of.items():
            if arm in results and other in results:
                share, won = share_of_full(results, arm), wins(results, arm, other)
                cells += [percent(share), shown(gain(results, arm, other, LOSS)), won]
            else:
                cells += [missing(ARMS[arm], model), "", ""]
        rows.append([f"`{arm}`", f"`{other}`", *cells])
    head = [cell for model in all_of for cell in (model, "gained", "")]
    return table(["arm", "against", *head], rows)


TAIL_PAIRS = ((FRESH, STORED), (THROUGH, FRESH), (THROUGH, STORED))


def tails(all_of: Everything) -> str:
    rows = []
    for model, results in all_of.items():
        for skipped in PERCENTS:
            names = [f"{tail}-{skipped}" for tail in TAILS]
            if all(name in results for name in names):
                losses = [str(measured(results, name, LOSS)) for name in names]
                gains = [
                    shown(gain(results, f"{one}-{skipped}", f"{other}-{skipped}", LOSS))
                    for one, other in TAIL_PAIRS
                ]
                rows.append([model, f"{skipped} %", *losses, *gains])
    versus = [f"{one} over {other}" for one, other in TAIL_PAIRS]
    return table(["model", "skipped", *TAILS, *versus], rows)


def cheaper(kind: str) -> Callable[[Everything], str]:
    """The table of a cheaper way to train: its mean loss lies within two standard errors of the
    usual one's, or not.
    """

    def made(all_of: Everything) -> str:
        rows = []
        for model, results in all_of.items():
            for skipped in (30, 50):
                usual, other = f"skip-{skipped}", f"{kind}-{skipped}"
                if not (usual in results and other in results):
                    continue
                exact, found = (measured(results, name, LOSS) for name in (usual, other))
                within = abs(found.mean - exact.mean) <= ERRORS * (exact.error or 0)
                verdict = "holds" if within else "does not hold"
                paired = shown(gain(results, other, usual, LOSS))
                rows.append([model, f"{skipped} %", exact, found, paired, verdict])
        return table(["model", "skipped", *CHEAPER[kind], "gained", "verdict"], rows)

    return made


def diagnosis(_: Everything) -> str:
    found = json.loads((HERE / "results" / "tiny-sana" / "diagnosis.json").read_text())
    return in_words(found)


def memory(all_of: Everything) -> str:
    """Bytes of a step by arm, and what they come to of the paper's recipe's."""
    files = {model: HERE / "results" / model / "memory.json" for model in all_of}
    found = {model: json.loads(file.read_text()) for model, file in files.items()}
    rows = []
    for arm in dict.fromkeys(name for of_model in found.values() for name in of_model):
        cells = []
        for of_model in found.values():
            total, usual = (sum(of_model.get(name, {}).values()) for name in (arm, "skip-50"))
            cells.append(f"{total:,} ({100 * total / usual:.0f} %)" if total else "-")
        rows.append([f"`{arm}`", *cells])
    return table(["arm", *all_of], rows)


def prior(_: Everything) -> str:
    rows = []
    for model, arms in json.loads((DOCS / "results" / "prior.json").read_text())["rows"].items():
        for title, row in arms.items():
            shares = [f"{100 * row[f'of the {name} without']:.1f} %" for name in ("gain", "drift")]
            verdict = "" if title == "without" else row["criterion"]
            rows.append([model, title, row["gain"], row["drift"], *shares, verdict])
    return table(["model", "prior", "gain", "drift", "of the gain", "of the drift", ""], rows)


FOUR_BITS = {"int4": "plain", "int4-srr": "SRR", "int4-odlri": "ODLRI"}
"""Arms in four bits -> how their adapters start."""


def four_bits(all_of: Everything) -> str:
    rows = []
    for model, results in all_of.items():
        for name, start in FOUR_BITS.items():
            arm = f"{name}-50"
            if arm not in results:
                continue
            exact, found = (measured(results, n, LOSS) for n in ("skip-50", arm))
            paired = shown(gain(results, arm, "skip-50", LOSS))
            rows.append([model, start, exact, found, paired])
    return table(["model", "start", "float32", "int4", "gained"], rows)


TABLES: dict[str, Callable[[Everything], str]] = {
    "verdicts": verdicts,
    "kept": kept,
    "past": past,
    "tails": tails,
    **{kind: cheaper(kind) for kind in CHEAPER},
    "int4": four_bits,
    "diagnosis": diagnosis,
    "memory": memory,
    "prior": prior,
}


def rendered(page: str, all_of: Everything) -> str:
    """A page with its tables as they are now."""

    def made(found: re.Match[str]) -> str:
        begin, name, _, end = found.groups()
        return begin + TABLES[name](all_of) + end

    return MARKED.sub(made, page)


def draw_tails(all_of: Everything) -> Any:
    """By how much each tail that runs beats the stored one."""
    canvas, grid = plt.subplots(
        1, len(all_of), figsize=(9, 3.6), layout="constrained", squeeze=False
    )
    for axes, (model, results) in zip(grid.flat, all_of.items(), strict=True):
        for shift, tail in ((-1, FRESH), (1, THROUGH)):
            pairs = {p: gain(results, f"{tail}-{p}", f"{STORED}-{p}", LOSS) for p in PERCENTS}
            there = {share: found for share, found in pairs.items() if found is not None}
            axes.errorbar(
                [share + shift for share in there],
                [found.mean for found in there.values()],
                yerr=[ERRORS * (found.error or 0) for found in there.values()],
                fmt="o",
                capsize=3,
                label=tail,
            )
        axes.axhline(0, color="black", lw=0.8)
        axes.set_title(model)
        axes.set_xticks(PERCENTS)
        axes.set_xlabel("% of blocks skipped")
        axes.grid(alpha=0.3)
        axes.legend()
    grid[0][0].set_ylabel("held-out loss gained over a stored\ntail (bars: 2 standard errors)")
    return canvas


def everything() -> Everything:
    """The runs of results/."""
    return {model: read_results(HERE / "results" / model / "results.json") for model in MODELS}


def main() -> None:
    found = everything()
    for page in PAGES:
        write_atomic(page, rendered(page.read_text(), found))
    save(draw_tails(found), DOCS / "results" / "tails.png")
    undecided = [c.says for c in CLAIMS if OPEN in [judge(r, c) for r in found.values()]]
    print("\n".join([f"{page}" for page in PAGES] + [f"not decided: {says}" for says in undecided]))


if __name__ == "__main__":
    main()
