"""The plain mean."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lane_interpreter import averages, random_members, steps_of

from swaft.averaging.rules import SWA
from swaft.errors import ConfigError

pytestmark = pytest.mark.unit


def test_swa_begins_with_the_weights_at_switch_on_as_algorithm_1_does():
    assert steps_of(SWA(start=4, every=2).plan(10)) == [4, 6, 8, 10]


def test_swa_without_its_start_is_torchs_convention():
    assert steps_of(SWA(start=4, every=2, include_start=False).plan(10)) == [6, 8, 10]


@given(
    start=st.integers(0, 60), every=st.integers(1, 9), total=st.integers(1, 80), include_start=st.booleans()
)
def test_the_announced_number_of_members_is_the_number_taken(start, every, total, include_start):
    rule = SWA(start=start, every=every, include_start=include_start)
    first = start + (0 if include_start else every)
    expected = len(range(first, total + 1, every))
    if expected < 2:
        with pytest.raises(ConfigError, match="start="):
            rule.plan(total)
    else:
        assert rule.plan(total).num_members == expected == len(steps_of(rule.plan(total)))


@given(total=st.integers(12, 60), every=st.integers(1, 3))
def test_swa_is_the_mean_of_its_members_all_along(total, every):
    plan = SWA(start=0.3, every=every).plan(total)
    members = random_members(plan)
    for count, average in enumerate(averages(plan, members), start=1):
        np.testing.assert_allclose(average, members[:count].mean(axis=0), rtol=1e-12)
