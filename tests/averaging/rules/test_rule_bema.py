"""The bias-corrected exponential moving average."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lane_interpreter import averages, random_members

from swaft.averaging.rules import BEMA
from swaft.errors import ConfigError

pytestmark = pytest.mark.unit


@given(
    ema_power=st.floats(0.0, 1.5),
    bias_power=st.floats(0.0, 1.5),
    lag=st.integers(1, 30),
    multiplier=st.floats(0.0, 3.0),
    start=st.integers(0, 10),
    every=st.integers(1, 4),
)
def test_bema_is_its_formula_all_along(ema_power, bias_power, lag, multiplier, start, every):
    rule = BEMA(ema_power, bias_power, lag, multiplier, start=start, every=every)
    plan = rule.plan(40)
    members = random_members(plan)
    mean, expected = members[0], [members[0]]
    for n, member in enumerate(members[1:], start=1):
        age = lag + multiplier * (start + n * every)
        beta, alpha = age**-ema_power, age**-bias_power
        mean = (1 - beta) * mean + beta * member
        expected.append(mean + alpha * (member - members[0]))
    np.testing.assert_allclose(averages(plan, members), expected, rtol=1e-9, atol=1e-9)


def test_the_defaults_are_the_published_ones():
    assert BEMA() == BEMA(ema_power=0.5, bias_power=0.2, lag=10, multiplier=1.0, start=0, every=400)
    plan = BEMA().plan(2000)
    assert [update.weight for update in plan.updates(1)] == [410**-0.5, 1.0]
    assert set(plan.readout(2).values()) == {1.0, 410**-0.2, -(410**-0.2)}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("ema_power", -0.1),
        ("ema_power", float("nan")),
        ("bias_power", -1),
        ("bias_power", "fast"),
        ("lag", 0),
        ("lag", 1.5),
        ("multiplier", -1.0),
        ("multiplier", float("inf")),
    ],
)
def test_an_option_out_of_range_is_named(option, value):
    with pytest.raises(ConfigError, match=f"{option} is"):
        BEMA(**{option: value}).plan(2000)
