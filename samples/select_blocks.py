"""Measure which blocks of a sample checkpoint may be skipped, and write its selection.json.

    python samples/select_blocks.py WORK [tiny-flux]    # minutes; goes on where it stopped

It measures by loss with the ends frozen, on the quickstart's toy and one of samples/reproduce. What
the paper's selector and the one by loss with masked text find goes to samples/reproduce/selections,
for the ablations. At the end it prints how far each agrees with the paper's, for which it needs
scipy (`pip install scipy`, or the extra "test").
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scipy.stats import spearmanr

from edge_dit.errors import BadInput
from edge_dit.pictures.dataset import read_folder
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import Plan
from edge_dit.planning.selection import NAME, Selection, write_selection
from edge_dit.select.selectors import Drawn, select_by_generation, select_by_loss
from edge_dit.select.subjects import Subject

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "reproduce"))
from subjects import write_subjects  # noqa: E402

TOYS = ("owl",)  # of the half that is not for the ablations
STEPS, PROMPTS, SEEDS = 300, 2, (1,)
JOBS = {"tiny-sana": "sana.toml", "tiny-flux": "flux.toml"}


def subject(plan: Plan, name: str, folder: Path) -> Subject:
    images, heldout = (
        read_folder(folder / part, None, plan.s_max) for part in ("train", "heldout")
    )
    return Subject(name, images, heldout)


def agreement(one: Selection, other: Selection) -> list[str]:
    """How far two selections of a model agree, as lines of a table.

    For every k: both choices, Spearman's rank correlation of the scores of all (n, m) with
    n + m = k, and the place of ``other``'s choice among them by the scores of ``one`` (1 is best).
    Where one of them gives all splits the same score, the correlation is nan, and scipy warns.

    Raises:
        BadInput: they are of models of different depth.
    """
    if one.layers != other.layers:
        raise BadInput(
            "selections",
            found=f"{one.layers} and {other.layers} blocks",
            expected="two selections of one model",
        )
    lines = [f"| k | {one.method} | {other.method} | rank correlation | place |", "|" + "---|" * 5]
    for skipped in range(1, one.layers):
        splits = one.splits(skipped)
        scores, others = ([s.score(*split) for split in splits] for s in (one, other))
        chosen = other.best(skipped)
        place = 1 + sum(score < one.score(*chosen) for score in scores)
        correlation = spearmanr(scores, others).statistic
        lines.append(
            f"| {skipped} | {one.best(skipped)} | {chosen} | {correlation:+.2f} "
            f"| {place} of {len(splits)} |"
        )
    return lines


def main(work: Path, model: str) -> None:
    plan = make_plan(read_job(ROOT / JOBS[model]))
    write_subjects(work / "subjects", TOYS)
    folders = {"toy": ROOT / "subject", **{toy: work / "subjects" / toy for toy in TOYS}}
    subjects = [subject(plan, name, folder) for name, folder in folders.items()]
    drawn = select_by_generation(
        plan, subjects, work, steps=STEPS, drawn=Drawn(prompts=PROMPTS, seeds=tuple(SEEDS))
    )
    kept = ROOT / "reproduce" / "selections"
    write_selection(drawn, kept / f"{model}.json")
    by_loss = []
    for frozen in (False, True):
        found = select_by_loss(plan, subjects, work, frozen=frozen, steps=STEPS)
        others = kept / f"{model}-{found.method}.json"
        write_selection(found, ROOT / model / NAME if frozen else others)
        by_loss.append(found)
    for found in (drawn, *by_loss):
        print(found.method, f"{found.seconds:.0f} s")
        print("  head", " ".join(f"{value:.3f}" for value in found.head))
        print("  tail", " ".join(f"{value:.3f}" for value in found.tail))
    for found in by_loss:
        print(*agreement(drawn, found), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder for what is finished")
    parser.add_argument("model", nargs="?", choices=JOBS, default="tiny-sana")
    asked = parser.parse_args()
    main(asked.work, asked.model)
