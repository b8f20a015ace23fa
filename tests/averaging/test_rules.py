from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaft.averaging.rules import EMA, SWA, resolve_start
from swaft.errors import ConfigError

pytestmark = pytest.mark.unit


def members(rule, total_steps):
    plan = rule.plan(total_steps)
    return [step for step in range(total_steps + 1) if plan.takes(step)]


def test_swa_begins_with_the_weights_at_switch_on_as_algorithm_1_does():
    assert members(SWA(start=4, every=2), 10) == [4, 6, 8, 10]


def test_swa_without_its_start_is_torchs_convention():
    assert members(SWA(start=4, every=2, include_start=False), 10) == [6, 8, 10]


def test_a_float_start_is_a_fraction_rounded_down_and_an_int_is_a_step():
    assert resolve_start(0.5, 101) == 50
    assert resolve_start(1.0, 101) == 101
    assert resolve_start(1, 101) == 1


def test_numpy_numbers_are_taken_for_what_they_are():
    assert resolve_start(np.float32(0.5), 100) == 50
    assert resolve_start(np.int64(7), 100) == 7


def test_ema_keeps_the_decay_from_the_second_member_on():
    plan = EMA(decay=0.9).plan(3)
    assert [update.weight for n in range(3) for update in plan.updates(n)] == [1.0, pytest.approx(0.1), pytest.approx(0.1)]


@given(
    start=st.integers(0, 60), every=st.integers(1, 9), total=st.integers(1, 80), include_start=st.booleans()
)
def test_the_announced_number_of_members_is_the_number_taken(start, every, total, include_start):
    rule = SWA(start=start, every=every, include_start=include_start)
    first = start + (0 if include_start else every)
    expected = len(range(first, total + 1, every))
    if expected < 2:
        with pytest.raises(ConfigError, match=r"averaging\.start"):
            rule.plan(total)
    else:
        assert rule.plan(total).num_members == expected == len(members(rule, total))


@given(n=st.integers(1, 40))
def test_swa_weights_make_the_uniform_mean(n):
    plan, mean = SWA(start=0).plan(n), 0.0
    values = [float(i * i) for i in range(n)]
    for count, value in enumerate(values):
        mean += plan.weight(count) * (value - mean)
    assert mean == pytest.approx(sum(values) / n)


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        (SWA(start=11), "averaging.start"),
        (SWA(start=10), "averaging.start"),
        (SWA(start=1.5), "averaging.start"),
        (SWA(start=-1), "averaging.start"),
        (SWA(start="late"), "averaging.start"),
        (SWA(every=0), "averaging.every"),
        (SWA(every=1.5), "averaging.every"),
        (EMA(decay=1.0), "averaging.decay"),
        (EMA(decay=0.0), "averaging.decay"),
    ],
)
def test_a_rule_that_does_not_fit_the_run_names_its_setting(rule, named):
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        rule.plan(10)
