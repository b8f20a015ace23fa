"""The mean of the last few members."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lane_interpreter import averages, lanes_along, random_members

from swaft.averaging.rules import LAWA, Readout
from swaft.errors import ConfigError

pytestmark = pytest.mark.unit


@given(last=st.integers(2, 9), every=st.integers(1, 3))
def test_lawa_is_the_mean_of_the_last_members_all_along(last, every):
    plan = LAWA(last=last, start=3, every=every).plan(40)
    members = random_members(plan)
    for count, average in enumerate(averages(plan, members), start=1):
        _, held = plan.resolved(count, Readout())
        assert held == range(max(0, count - last), count)
        np.testing.assert_allclose(average, members[list(held)].mean(axis=0), rtol=1e-12)


def test_the_lanes_of_lawa_are_members_bit_for_bit():
    plan = LAWA(last=4).plan(10)
    members = random_members(plan)
    *_, lanes = lanes_along(plan, members)
    kept = sorted(lane.tolist() for lane in lanes.values())
    assert kept == sorted(members[-4:].tolist())


def test_more_members_than_the_run_has_are_refused():
    assert LAWA(last=11).plan(10).num_members == 11
    with pytest.raises(ConfigError, match=r"last is 12.* 11 members"):
        LAWA(last=12).plan(10)


@pytest.mark.parametrize("last", [1, 0, -3, 2.5, True])
def test_a_mean_of_fewer_than_two_is_refused(last):
    with pytest.raises(ConfigError, match="last is"):
        LAWA(last=last).plan(10)
