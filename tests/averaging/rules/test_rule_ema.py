"""The exponential moving average: its decay, its half-life and how it warms up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lane_interpreter import averages, random_members, weights_of

from swaft.averaging.rules import EMA
from swaft.errors import ConfigError

pytestmark = pytest.mark.unit


def recursion(members, decay_at):
    mean = members[0]
    yield mean
    for n, member in enumerate(members[1:], start=1):
        mean = decay_at(n) * mean + (1 - decay_at(n)) * member
        yield mean


@given(decay=st.floats(0.001, 0.9999), every=st.integers(1, 3))
def test_ema_is_its_recursion_from_the_first_member_on(decay, every):
    plan = EMA(decay=decay, start=7, every=every).plan(50)
    members = random_members(plan)
    expected = list(recursion(members, lambda n: decay))
    np.testing.assert_allclose(averages(plan, members), expected, rtol=1e-11)


@given(decay=st.floats(0.05, 0.9999))
def test_ramp_is_tensorflows_bound_on_the_decay(decay):
    plan = EMA(decay=decay, warmup="ramp").plan(60)
    members = random_members(plan)
    expected = list(recursion(members, lambda n: min(decay, (1 + n) / (10 + n))))
    np.testing.assert_allclose(averages(plan, members), expected, rtol=1e-11)


@given(decay=st.one_of(st.floats(0.01, 0.9999), st.floats(1e-9, 1e-6).map(lambda gap: 1 - gap)))
def test_debias_is_the_sum_begun_at_zero_and_divided_as_in_adam(decay):
    plan = EMA(decay=decay, warmup="debias").plan(40)
    members = random_members(plan)
    total, expected = np.zeros_like(members[0]), []
    for n, member in enumerate(members):
        total = decay * total + (1 - decay) * member
        # sum of decay^i, so that the reference keeps its digits where decay^(n + 1) is next to 1
        expected.append(total / ((1 - decay) * sum(decay**i for i in range(n + 1))))
    np.testing.assert_allclose(averages(plan, members), expected, rtol=1e-11)


def test_debias_near_a_decay_of_one_is_the_plain_mean():
    plan = EMA(decay=1 - 1e-12, warmup="debias").plan(30)
    assert weights_of(plan) == pytest.approx([1 / (n + 1) for n in range(31)], rel=1e-9)


@given(half_life=st.integers(1, 200), every=st.integers(1, 5))
def test_after_a_half_life_the_old_mean_counts_half(half_life, every):
    decay = EMA(half_life=half_life, every=every).decay_in(1000)
    assert decay ** (half_life / every) == pytest.approx(0.5)


def test_a_half_life_may_be_a_share_of_the_run():
    assert EMA(half_life=0.1).decay_in(500) == EMA(half_life=50).decay_in(500)
    assert EMA(half_life=0.1).decay_in(5000) == EMA(half_life=500).decay_in(5000)


def test_neither_decay_nor_half_life_means_a_tenth_of_the_run_and_says_so():
    assert EMA() == EMA(half_life=0.1)
    assert "half_life=0.1" in repr(EMA())
    assert EMA().decay_in(5) == pytest.approx(0.25)  # of half a step: a very short run has an average too


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        (EMA(decay=1.0), "decay"),
        (EMA(decay=0.0), "decay"),
        (EMA(decay=float("nan")), "decay"),
        (EMA(decay="slow"), "decay"),
        (EMA(decay=0.9, half_life=10), "decay is 0.9 and half_life is 10"),
        (EMA(half_life=0), "half_life"),
        (EMA(half_life=0.0), "half_life"),
        (EMA(half_life=50.0), "half_life"),
        (EMA(half_life=True), "half_life"),
        (EMA(half_life=0.00001, every=4), "half_life"),
        (EMA(half_life=10**17), "half_life"),
        (EMA(warmup="slow"), "warmup"),
    ],
)
def test_an_option_out_of_range_is_named(rule, named):
    with pytest.raises(ConfigError, match=named):
        rule.plan(10)
