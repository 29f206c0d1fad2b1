"""Measure which blocks of tiny-sana may be skipped, and write samples/tiny-sana/selection.json.

    python samples/select_blocks.py WORK    # an hour on two cores; goes on where it stopped

By loss with the ends frozen, on the quickstart's toy and one of samples/reproduce. What the paper's
selector and the one by loss with masked text find goes to samples/reproduce/selections, for the
ablations. Prints how far each agrees.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edge_dit.pictures.images import read_folder
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import Plan
from edge_dit.planning.selection import NAME, compare, write_selection
from edge_dit.select.selectors import Subject, select_by_generation, select_by_loss

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "reproduce"))
from subjects import write_subjects  # noqa: E402

TOYS = ("owl",)  # of the half that is not for the ablations
STEPS, PROMPTS, SEEDS = 300, 2, (1,)


def subject(plan: Plan, name: str, folder: Path) -> Subject:
    images, heldout = (
        read_folder(folder / part, None, plan.s_max) for part in ("train", "heldout")
    )
    return Subject(name, images, heldout)


def main(work: Path) -> None:
    plan = make_plan(read_job(ROOT / "sana.toml"))
    write_subjects(work / "subjects", TOYS)
    folders = {"toy": ROOT / "subject", **{toy: work / "subjects" / toy for toy in TOYS}}
    subjects = [subject(plan, name, folder) for name, folder in folders.items()]
    drawn = select_by_generation(
        plan, subjects, work, steps=STEPS, prompts=PROMPTS, seeds=list(SEEDS)
    )
    write_selection(drawn, ROOT / "reproduce" / "selections" / "tiny-sana.json")
    by_loss = []
    for frozen in (False, True):
        found = select_by_loss(plan, subjects, work, frozen=frozen, steps=STEPS)
        others = ROOT / "reproduce" / "selections" / f"{found.method}.json"
        write_selection(found, ROOT / "tiny-sana" / NAME if frozen else others)
        by_loss.append(found)
    for found in (drawn, *by_loss):
        print(found.method, f"{found.seconds:.0f} s")
        print("  head", " ".join(f"{value:.3f}" for value in found.head))
        print("  tail", " ".join(f"{value:.3f}" for value in found.tail))
    for found in by_loss:
        print(*compare(drawn, found), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
