"""Means over windows that are chosen after training."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lane_interpreter import averages, lanes_along, random_members, steps_of

from swaft.averaging.rules import SWA, Readout, Windows
from swaft.errors import AveragingError, ConfigError

pytestmark = pytest.mark.unit

runs = st.builds(
    lambda blocks, start, every, total: Windows(blocks, start=start, every=every).plan(total),
    st.integers(2, 12),
    st.integers(0, 8),
    st.integers(1, 3),
    st.integers(14, 50),
)


def mean_of(lanes, coefficients):
    return sum(c * lanes[i] for i, c in coefficients.items())


@given(plan=runs)
def test_every_window_of_whole_blocks_is_the_plain_mean_of_its_members_all_along(plan):
    members, steps = random_members(plan), np.array(steps_of(plan))
    for count, lanes in enumerate(lanes_along(plan, members), start=1):
        for (start, _), (_, end) in product(plan.boundaries(count), repeat=2):
            if start > end:
                continue
            inside = (steps[:count] >= start) & (steps[:count] <= end)
            expected = members[:count][inside].mean(axis=0)
            np.testing.assert_allclose(
                mean_of(lanes, plan.readout(count, Readout(start=start, end=end))), expected, rtol=1e-11
            )


@given(plan=runs)
def test_the_boundaries_are_the_only_ones_and_blocks_are_equal_to_within_a_member(plan):
    count = plan.num_members
    boundaries = plan.boundaries(count)
    assert [step for begin, end in boundaries for step in range(begin, end + 1, plan.every)] == steps_of(plan)
    sizes = [(end - begin) // plan.every + 1 for begin, end in boundaries]
    assert len(sizes) == len(plan.lanes)
    assert max(sizes) - min(sizes) <= 1
    begins, ends = {begin for begin, _ in boundaries}, {end for _, end in boundaries}
    for step in steps_of(plan):
        for which, known in (("start", begins), ("end", ends)):
            if step in known:
                assert plan.readout(count, Readout(**{which: step}))
            else:
                with pytest.raises(AveragingError, match=r"cuts a block.*plan\.boundaries"):
                    plan.readout(count, Readout(**{which: step}))


@given(plan=runs)
def test_without_a_choice_all_members_are_averaged(plan):
    members = random_members(plan)
    for count, average in enumerate(averages(plan, members), start=1):
        np.testing.assert_allclose(average, members[:count].mean(axis=0), rtol=1e-11)


def test_a_window_to_the_end_is_swa_from_its_start():
    windows, swa = Windows(blocks=8).plan(64), SWA(start=0.5).plan(64)
    members = random_members(windows)
    *_, lanes = lanes_along(windows, members)
    expected = averages(swa, members[32:])[-1]
    np.testing.assert_allclose(mean_of(lanes, windows.readout(65, Readout(start=0.5))), expected, rtol=1e-12)


def test_both_ends_of_a_window_are_in_it():
    plan = Windows(blocks=4).plan(15)
    assert plan.boundaries(16) == [(0, 3), (4, 7), (8, 11), (12, 15)]
    assert plan.window(16, 4, 11) == range(4, 12)
    assert plan.readout(16, Readout(start=4, end=11)) == {1: 0.5, 2: 0.5}


def test_steps_between_two_members_name_the_boundary_they_lie_at():
    plan = Windows(blocks=2, start=10, every=10).plan(40)
    assert plan.boundaries(4) == [(10, 20), (30, 40)]
    assert plan.window(4, 21, 40) == plan.window(4, 30, None) == range(2, 4)
    assert plan.window(4, None, 29) == plan.window(4, None, 20) == range(2)


def test_a_block_that_is_being_filled_counts_with_the_members_it_has():
    plan = Windows(blocks=4).plan(15)
    assert plan.boundaries(10) == [(0, 3), (4, 7), (8, 9)]
    assert plan.readout(10, Readout(start=4)) == {1: 4 / 6, 2: 2 / 6}
    assert (
        plan.readout(10, Readout(start=4, end=9))
        == plan.readout(10, Readout(start=4, end=1.0))
        == plan.readout(10, Readout(start=4))
    )


def test_a_block_is_finished_with_its_last_member():
    plan = Windows(blocks=3).plan(9)
    assert [plan.finished(n) for n in range(10)] == [(), (), (0,), (), (), (1,), (), (), (), (2,)]


def test_fewer_members_than_blocks_are_kept_whole():
    plan = Windows(blocks=32, every=10).plan(40)
    assert plan.boundaries(5) == [(step, step) for step in (0, 10, 20, 30, 40)]


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"start": 5}, "begins at step 5 cuts .* step 4 or 8"),
        ({"start": 13}, "begins at step 13 cuts .* step 12 "),
        ({"end": 9}, "ends at step 9 cuts .* step 7 or 11"),
        ({"end": 1}, "ends at step 1 cuts .* step 3 "),
        ({"start": 0.5, "end": 12}, "begins at step 7 cuts .* step 4 or 8"),
        ({"start": 8, "end": 7}, "holds none"),
        ({"start": 16}, "holds none"),
        ({"end": 16}, "past the last step of the run, 15"),
        ({"start": 1.5}, "the window's start is 1.5"),
        ({"end": -1}, "the window's end is -1"),
        ({"end": "late"}, "the window's end is 'late'"),
    ],
)
def test_a_window_that_cannot_be_had_is_refused_with_the_nearest_boundaries(choices, said):
    with pytest.raises(AveragingError, match=said):
        Windows(blocks=4).plan(15).readout(16, Readout(**choices))


def test_a_window_from_before_the_first_member_is_refused():
    with pytest.raises(
        AveragingError, match=r"start=0\.25 is step 5, .* from step 10 on \(the rule.s start\)"
    ):
        Windows(blocks=2, start=10).plan(20).readout(11, Readout(start=0.25))


def test_a_run_longer_than_announced_is_refused():
    with pytest.raises(AveragingError, match="member 17 of 16"):
        Windows(blocks=4).plan(15).updates(16)


@pytest.mark.parametrize("blocks", [1, 0, 2.5, True])
def test_fewer_than_two_blocks_are_refused(blocks):
    with pytest.raises(ConfigError, match="blocks is"):
        Windows(blocks=blocks).plan(15)
