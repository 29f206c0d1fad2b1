"""samples/select_blocks.py: how far two selections agree."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from scipy.stats import ConstantInputWarning

from edge_dit.errors import BadInput
from edge_dit.planning.selection import Method, Selection

sys.path.append(str(Path(__file__).resolve().parents[2] / "samples"))

from select_blocks import agreement


def selection(head: list[float], tail: list[float], method: Method = "generation") -> Selection:
    return Selection(
        model_hash="0" * 64,
        layers=len(head) - 1,
        method=method,
        embedding="",
        subjects=["toy"],
        steps=3,
        prompts=[],
        seeds=[],
        draws=1,
        over="held-out images",
        head=head,
        tail=tail,
        seconds=1.0,
    )


def test_it_tells_choices_correlation_and_place():
    one = selection([0, 1, 2, 3], [0, 9, 9, 9])
    other = selection([0, 9, 9, 9], [0, 1, 2, 3], "loss-frozen")
    same, against = agreement(one, one), agreement(one, other)
    assert len(same) == 2 + 2  # k = 1 and 2
    assert same[3] == "| 2 | (2, 0) | (2, 0) | +1.00 | 1 of 3 |"
    assert against[0] == "| k | generation | loss-frozen | rank correlation | place |"
    assert against[2] == "| 1 | (1, 0) | (0, 1) | -1.00 | 2 of 2 |"


def test_equal_scores_share_their_mean_rank():
    """Scores (5, 5, 6) have ranks (1.5, 1.5, 3), scores (1, 3, 3) have (1, 2.5, 2.5)."""
    one = selection([0, 2, 6, 9], [0, 3, 5, 9])
    other = selection([0, 1, 3, 9], [0, 2, 1, 9])
    assert agreement(one, other)[3] == "| 2 | (1, 1) | (0, 2) | +0.50 | 1 of 3 |"


def test_where_all_scores_are_equal_there_is_no_correlation():
    one, other = selection([0, 1, 9], [0, 1, 9]), selection([0, 1, 9], [0, 2, 9])
    with pytest.warns(ConstantInputWarning):
        lines = agreement(one, other)
    assert lines[2] == "| 1 | (1, 0) | (1, 0) | +nan | 1 of 2 |"


def test_selections_of_models_of_different_depth():
    with pytest.raises(BadInput, match="3 and 2 blocks"):
        agreement(selection([0, 1, 2, 3], [0, 9, 9, 9]), selection([0, 1, 2], [0, 1, 2]))
