"""Numbers of a job that are allowed, but contradict each other; said before any work is done."""

from __future__ import annotations

from collections.abc import Sequence

from edge_dit.planning.job import Export, Train

MOST_PASSES = 10
"""Passes over a bank from which fewer steps or more draws are better. A draw fixes picture, crop,
noise and noise level: many passes teach those, not the subject.
"""
NAMED = 3
"""Most pictures named in a line."""


def doubts(train: Train, pictures: Sequence[str]) -> list[str]:
    """Lines for people about numbers that hardly mean what they say.

    Args:
        train: steps and draws of the job.
        pictures: names of the pictures, in the order in which they take turns.

    Example:
        >>> doubts(Train(resolution=64, patch=32, steps=4, draws=4), ["a.png"] * 3)
        []
    """
    found = []
    if unseen := pictures[train.draws :]:
        names = ", ".join(unseen[:NAMED]) + (", ..." if len(unseen) > NAMED else "")
        found.append(
            f"{len(unseen)} of {len(pictures)} pictures are never drawn ({names}): draws = "
            f"{train.draws}; set [train] draws to {len(pictures)} or more"
        )
    if train.steps < train.draws:
        found.append(
            f"{train.draws - train.steps} of {train.draws} draws are never trained on: steps = "
            f"{train.steps}; set [train] draws to {train.steps}, or steps to {train.draws} or more"
        )
    if train.steps > MOST_PASSES * train.draws:
        found.append(
            f"each of {train.draws} draws is trained on {train.steps / train.draws:.0f} times: "
            f"steps = {train.steps}; set [train] draws to {-(-train.steps // MOST_PASSES)} or more"
        )
    return found


def unused_prompts(export: Export, guided: bool) -> list[str]:
    """Lines for people about prompts that nothing will encode.

    Args:
        export: of the job.
        guided: whether the family's pipeline guides away from a negative prompt.

    Example:
        >>> unused_prompts(Export(prompts=["a toy"]), guided=True)
        ['[export] prompts are not encoded: loop is false; set loop = true, or export with --loop']
    """
    given = {"prompts": bool(export.prompts), "negative_prompt": export.negative_prompt is not None}
    found = []
    if not export.loop:
        found = [
            f"[export] {key} are not encoded: loop is false; set loop = true, or export with --loop"
            for key, value in given.items()
            if value
        ]
    elif given["negative_prompt"] and not guided:
        why = "this pipeline guides away from none"
        found.append(f"[export] negative_prompt is not encoded: {why}")
    return found
