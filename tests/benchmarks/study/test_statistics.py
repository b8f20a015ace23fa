"""Intervals, sign tests, and what it would take for a difference to be clear."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.study import statistics

pytestmark = pytest.mark.unit


def test_an_interval_holds_the_true_difference_and_ignores_what_pairs_share():
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(40):
        pairs = {task: generator.normal(2.0, 1.0, 10) for task in "abcdef"}
        held += (found := statistics.over_tasks(pairs)).low < 2.0 < found.high
    assert held >= 34
    assert statistics.over_seeds(np.full(5, 3.0)) == statistics.Interval(3.0, 3.0, 3.0, 5)


def test_few_seeds_or_tasks_that_agree_by_chance_are_not_clear():
    generator = np.random.default_rng(3)
    seeds = [statistics.over_seeds(generator.normal(0, 1, 3)).clear for _ in range(200)]
    tasks = [
        statistics.over_tasks({task: generator.normal(0, 1, 3) for task in "abcd"}).clear for _ in range(200)
    ]
    assert sum(seeds) < 20  # 5 % of 200 are 10; a bootstrap alone gives a quarter
    assert sum(tasks) < 20


def test_over_tasks_an_interval_is_as_wide_as_tasks_differ_however_many_seeds():
    pairs = {"a": np.full(50, -4.0), "b": np.full(50, 4.0), "c": np.full(50, 0.5)}
    found = statistics.over_tasks(pairs)
    assert found.low < -2 < 2 < found.high


def test_over_tasks_that_agree_an_interval_is_as_wide_as_the_mean_of_their_seeds_varies():
    seeds = np.linspace(-1, 1, 9)
    found = statistics.over_tasks(dict.fromkeys("abcdefgh", seeds))
    assert (found.mean, found.count) == (0, 72)
    assert (-found.low, found.high) == pytest.approx([1.96 * seeds.std() / 72**0.5] * 2, rel=0.07)


def test_no_difference_at_all_is_not_clear():
    assert not statistics.over_seeds(np.zeros(5)).clear


def test_signs_are_counted_by_task_and_a_mean_over_tasks_needs_four():
    pairs = {task: np.array([-1.0, -2.0, 0.5]) for task in "abc"}
    found = statistics.compare(pairs)
    assert (found.lower, found.higher, found.p_value, found.count) == (3, 0, 0.25, 9)
    assert found.overall is None
    tied = statistics.compare(pairs | {"d": np.zeros(3)})
    assert (tied.lower, tied.higher, tied.p_value) == (3, 0, 0.25)
    assert tied.overall is not None


def test_holm_multiplies_by_how_many_are_left_and_never_goes_down():
    assert statistics.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert statistics.holm([0.9, 0.6]) == [1.0, 1.0]


def test_a_baseline_rarely_differs_from_itself_and_its_seeds_are_not_paired_with_themselves():
    generator = np.random.default_rng(2)
    share = statistics.false_alarms({task: generator.normal(0, 1, 10) for task in "abcdefgh"})
    assert share is not None
    assert 0 < share < 0.2
    assert statistics.false_alarms({"a": np.zeros(3), "b": np.zeros(9)}) is None


def test_an_interval_can_be_below_0_just_if_some_values_of_the_missing_tasks_make_it_so():
    generator = np.random.default_rng(0)
    found = set()
    for _ in range(60):
        known = generator.normal(-1, 1, 3)
        tried = np.linspace(-20, 20, 4001)
        means = np.stack([np.broadcast_to(value, tried.shape) for value in known] + [tried])
        high = means.mean(0) + 3.182446 * means.std(0, ddof=1) / 2
        found.add(bool((high < 0).any()))
        assert statistics.can_be_below(list(known), 4) == (high < 0).any()
    assert found == {True, False}
    assert statistics.can_be_below([-0.1], 4)
    assert not statistics.can_be_below([0.1], 4)


def test_the_tasks_needed_are_the_fewest_whose_interval_excludes_0():
    values = np.array([0.1, 0.9, -0.4, 1.6])
    found = statistics.compare({str(i): np.array([value, value]) for i, value in enumerate(values)})
    needed = statistics.tasks_needed(found)
    assert needed == 13  # 2.179 * 0.881 / sqrt(13) = 0.533 < 0.55, and 2.201 * 0.881 / sqrt(12) = 0.560


def test_tasks_needed_are_more_than_those_measured_and_are_not_counted_without_end():
    def needed(*means: float) -> int | None:
        return statistics.tasks_needed(
            statistics.compare({str(i): np.array([mean, mean]) for i, mean in enumerate(means)})
        )

    assert needed(0.5, 0.5, 0.5) == 4
    for means in [
        (-0.1, -0.9, 0.4, -1.6),
        (0.1, 0.2, -0.3),
        (0.5, -0.5),
        (0.5,),
    ]:  # the sum of the second: 5.6e-17
        assert needed(*means) is None
