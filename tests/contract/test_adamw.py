"""The learning rate's course."""

import math

import pytest

from edge_dit.contract.adamw import DECAY_SHARE, learning_rate


def test_decay_is_the_default_and_is_that_of_before():
    for step in range(10):
        before = 0.3 * min(1.0, (10 - step) / (DECAY_SHARE * 10))
        assert learning_rate(step, 10, 0.3) == before
        assert learning_rate(step, 10, 0.3, "decay", 0) == before


@pytest.mark.parametrize(
    ("schedule", "course"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [(1 + math.cos(math.pi * n / 4)) / 2 for n in range(4)]),
    ],
)
def test_courses(schedule, course):
    found = [learning_rate(step, 4, 2.0, schedule) for step in range(4)]
    assert found == pytest.approx([2 * share for share in course])


@pytest.mark.parametrize("schedule", ["decay", "constant", "linear", "cosine"])
def test_warm_up_multiplies_the_first_steps(schedule):
    for step in range(20):
        share = min(1.0, (step + 1) / 5)
        plain = learning_rate(step, 20, 1.0, schedule)
        assert learning_rate(step, 20, 1.0, schedule, 4) == pytest.approx(share * plain)
        assert 0 < learning_rate(step, 20, 1.0, schedule, 4) <= 1
