"""The split: what overrides a job, where a ratio's blocks lie, and what cannot be trained."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_dit.planning.job import PlanOptions
from edge_dit.planning.split import Split, SplitRequest, choose_split, requested, split_by_ratio


@given(st.integers(1, 80), st.floats(0, 1, exclude_max=True))
def test_split_skips_the_asked_share_with_more_at_the_front(layers, ratio):
    head, tail = split_by_ratio(layers, ratio)
    assert head + tail == round(layers * ratio)
    assert head >= tail >= 0


def test_papers_ratios_on_flux():
    assert split_by_ratio(57, 0.5) == (19, 9)
    assert split_by_ratio(12, 0.5) == (4, 2)


def test_a_request_replaces_the_jobs_blocks_and_keeps_its_ratio():
    options = PlanOptions(skip_ratio=0.25, head_skip=1, tail_skip=2, inner_skips=[(2, 3)])
    whole = SplitRequest(0.25, 1, 2, ((2, 3),))
    assert requested(options) == requested(options, SplitRequest()) == whole
    assert requested(options, SplitRequest(head_skip=4)) == SplitRequest(0.25, head_skip=4)
    assert requested(options, SplitRequest(skip_ratio=0.5)) == SplitRequest(0.5)


def test_ends_that_are_not_asked_for_follow_from_the_ratio():
    assert choose_split(12, SplitRequest()) == Split(12, 4, 2)
    assert choose_split(12, SplitRequest(0.25, tail_skip=5)) == Split(12, 2, 5)
    split = choose_split(12, SplitRequest(head_skip=0, tail_skip=1, inner_skips=((2, 4), (7, 8))))
    assert split.trained == [0, 1, 4, 5, 6, 8, 9, 10]
    assert not split.faults


@pytest.mark.parametrize(
    ("request_", "where"),
    [
        (SplitRequest(head_skip=3, tail_skip=1), ["plan"]),
        (SplitRequest(head_skip=0, tail_skip=0, inner_skips=((0, 1),)), ["plan.inner_skips"]),
        (
            SplitRequest(head_skip=0, tail_skip=0, inner_skips=((1, 4), (2, 2))),
            2 * ["plan.inner_skips"],
        ),
    ],
)
def test_faults_of_a_split_come_together(request_, where):
    assert [fault.where for fault in choose_split(4, request_).faults] == where
