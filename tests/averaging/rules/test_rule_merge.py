"""Merging by given weights, and the decay of the learning rate that it imitates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lane_interpreter import averages, random_members, weights_of

from swaft.averaging.rules import SWA, Merge
from swaft.errors import AveragingError, ConfigError

pytestmark = pytest.mark.unit

weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=2, max_size=20).filter(any)


@given(weights=weights, every=st.integers(1, 3))
def test_merge_is_the_weighted_mean_all_along(weights, every):
    plan = Merge(weights=weights, start=0, every=every).plan((len(weights) - 1) * every)
    members = random_members(plan)
    for count, average in enumerate(averages(plan, members), start=1):
        total = sum(weights[:count])
        if total == 0:
            expected = members[count - 1]
        else:
            expected = sum(c * member for c, member in zip(weights[:count], members, strict=False)) / total
        np.testing.assert_allclose(average, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "decay"),
    [
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
        ("1-sqrt", lambda x: 1 - math.sqrt(x)),
    ],
)
@pytest.mark.parametrize("total", [2, 30])
def test_a_named_merge_counts_every_update_as_the_decay_would_have(name, decay, total):
    plan = Merge(weights=name, start=0).plan(total)
    members = random_members(plan)
    moves = np.diff(members, axis=0)
    shrunk = sum(decay(j / len(members)) * move for j, move in enumerate(moves, start=1))
    np.testing.assert_allclose(averages(plan, members)[-1], members[0] + shrunk, rtol=1e-11)


def test_imitating_a_linear_decay_is_the_plain_mean():
    merge, swa = Merge(weights="linear").plan(200), SWA().plan(200)
    assert weights_of(merge) == pytest.approx(weights_of(swa))


def test_arrays_become_numbers_that_the_repr_shows():
    rule = Merge(weights=np.full(2000, 0.5))
    assert rule == Merge(weights=[0.5] * 2000)
    assert repr(rule).count("0.5") == 2001  # and the default start


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.0] * 10, "10 numbers for 11 members"),
        ([1.0] * 10 + [-1.0], "-1.0 for member 10"),
        ([math.nan] + [1.0] * 10, "nan for member 0"),
        ([math.inf] + [1.0] * 10, "inf for member 0"),
        (["1"] * 11, "'1' for member 0"),
        ([0.0] * 11, "sum to 0.0"),
        ("quadratic", "linear, cosine, 1-sqrt"),
    ],
)
def test_weights_that_make_no_average_are_refused(weights, said):
    with pytest.raises(ConfigError, match=r"weights") as caught:
        Merge(weights=weights, start=0).plan(10)
    assert said in str(caught.value)


def test_a_run_longer_than_its_weights_is_refused():
    plan = Merge(weights="cosine", start=0, every=2).plan(10)
    with pytest.raises(AveragingError, match=r"step 12 are member 7 of 6.*total_steps"):
        plan.updates(6)
