"""What is common to all rules: which steps are members, and the tables of their lanes."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lane_interpreter import steps_of

import swaft
from swaft.averaging.rules import (
    BEMA,
    EMA,
    LAWA,
    RULES,
    SWA,
    Merge,
    PowerEMA,
    Readout,
    Windows,
    WindowsPlan,
    rule_name,
)
from swaft.averaging.rules.base import resolve_start
from swaft.averaging.rules.power_ema import PowerEMAPlan
from swaft.errors import AveragingError, ConfigError

pytestmark = pytest.mark.unit

decays = st.floats(0.01, 0.9999)
starts = st.one_of(st.integers(0, 20), st.floats(0.0, 0.5))
rules = st.one_of(
    st.builds(SWA, include_start=st.booleans()),
    st.builds(EMA, decay=decays, warmup=st.sampled_from(["none", "ramp", "debias"])),
    st.builds(EMA, half_life=st.one_of(st.integers(1, 50), st.floats(0.01, 1.0))),
    st.builds(LAWA, last=st.integers(2, 6)),
    st.builds(Merge, weights=st.sampled_from(["linear", "cosine", "1-sqrt"])),
    st.builds(BEMA, ema_power=st.floats(0.0, 2.0), bias_power=st.floats(0.0, 2.0), lag=st.integers(1, 30)),
    st.builds(PowerEMA, snapshots=st.integers(1, 20)),
    st.builds(Windows, blocks=st.integers(2, 40)),
)


@st.composite
def plans(draw):
    """A plan of any rule, over a run that has enough members for it."""
    rule = replace(draw(rules), start=draw(starts), every=draw(st.integers(1, 4)))
    return rule.plan(draw(st.integers(60, 120)))


@given(plan=plans())
def test_the_announced_members_are_those_taken_for_every_rule(plan):
    steps = steps_of(plan)
    assert len(steps) == plan.num_members
    assert [plan.step_of(n) for n in range(plan.num_members)] == steps
    assert all(plan.members_until(step) == n + 1 for n, step in enumerate(steps))


@given(plan=plans())
def test_lanes_begin_with_a_copy_and_no_finished_lane_moves_again(plan):
    written, finished = set(), set()
    for n in range(plan.num_members):
        moved = set()
        for update in plan.updates(n):
            assert 0 <= update.lane < len(plan.lanes)
            assert update.lane not in finished
            assert 0.0 < update.weight <= 1.0
            assert update.lane in written or update.weight == 1.0
            assert update.source is None or update.source in written
            assert plan.lanes[update.lane] or update.weight == 1.0, "copies are only ever written over"
            written.add(update.lane)
            moved.add(update.lane)
        assert moved >= set(plan.finished(n))
        finished |= set(plan.finished(n))
        coefficients = plan.readout(n + 1)
        assert set(coefficients) <= written
        assert sum(coefficients.values()) == pytest.approx(1.0, abs=1e-12)
    assert written == set(range(len(plan.lanes))), "every lane that is announced is used"


@given(plan=plans())
def test_a_choice_that_a_rule_does_not_offer_is_refused(plan):
    if not isinstance(plan, WindowsPlan):
        with pytest.raises(AveragingError, match="'end'"):
            plan.readout(2, Readout(end=1.0))
    if not isinstance(plan, PowerEMAPlan):
        with pytest.raises(AveragingError, match="'sigma_rel'"):
            plan.readout(2, Readout(sigma_rel=0.1))


@given(rule=rules)
def test_the_repr_of_a_rule_is_all_of_it(rule):
    assert eval(repr(rule), {type(rule).__name__: type(rule)}) == rule


def test_every_rule_of_configurations_is_exported():
    assert set(RULES.values()) <= {getattr(swaft, name) for name in swaft.__all__}


def test_a_float_start_is_a_fraction_rounded_down_and_an_int_is_a_step():
    assert resolve_start(0.5, 101) == 50
    assert resolve_start(1.0, 101) == 101
    assert resolve_start(1, 101) == 1


@given(st.integers(0, 1000), st.integers(0, 10**6), st.sampled_from([float, np.float32]))
def test_a_fraction_is_the_decimal_number_that_was_written(thousandths, total, kind):
    assert resolve_start(kind(f"{thousandths / 1000:.3f}"), total) == thousandths * total // 1000


def test_fractions_of_exact_types_are_taken_as_they_are():
    assert resolve_start(Fraction(1, 3), 9) == 3
    assert resolve_start(0.29, 100) == 29
    assert EMA(half_life=0.1).decay_in(30) == 0.5 ** (1 / 3)
    plan = Windows(blocks=101).plan(100)
    assert plan.window(101, start=0.29, end=0.57) == range(29, 58)


def test_numpy_numbers_are_taken_for_what_they_are():
    assert resolve_start(np.float32(0.5), 100) == 50
    assert resolve_start(np.int64(7), 100) == 7


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"start": 11}, "start"),
        ({"start": 1.5}, "start"),
        ({"start": -1}, "start"),
        ({"start": "late"}, "start"),
        ({"every": 1.5}, "every"),
    ],
)
def test_a_start_or_interval_that_does_not_fit_the_run_is_named(options, named):
    with pytest.raises(ConfigError, match=rf"{named}(=| is )"):
        replace(SWA(), **options).plan(10)


@pytest.mark.parametrize(("options", "named"), [({"start": 10}, "start"), ({"every": 0}, "every")])
@pytest.mark.parametrize(
    "rule",
    [
        SWA(),
        EMA(half_life=0.1),
        LAWA(last=2),
        Merge(weights="linear"),
        BEMA(every=1),
        PowerEMA(),
        Windows(),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_every_rule_checks_its_start_and_its_interval(rule, options, named):
    with pytest.raises(ConfigError, match=rf"{named}(=| is )"):
        replace(rule, **options).plan(10)


def test_a_run_that_ends_before_the_first_member_averages_no_weights():
    with pytest.raises(ConfigError, match="at step 50 of 10, so 0 weights would be averaged"):
        SWA(start=50).plan(10)


def test_what_is_read_out_is_said_in_words():
    def words(rule, **chosen) -> str:
        return rule.plan(8).in_words(9, Readout(**chosen))

    assert words(SWA(start=0)) == "the 9 weights from step 0 to 8"
    assert words(LAWA(last=2)) == "the 2 weights from step 7 to 8"
    assert words(Windows(blocks=9), start=8) == "the weights of step 8"
    assert words(PowerEMA(), sigma_rel=0.1) == "the 9 weights from step 0 to 8, with sigma_rel=0.1"
    assert words(SWA(start=0), blend=0) == "the last weights"
    assert words(SWA(start=0), blend=0.3, scope="no_head") == (
        "the 9 weights from step 0 to 8, 0.3 of the way from the last ones, with the last weights in the head"
    )


class Own(SWA):
    """A rule that swaft does not know."""


@pytest.mark.parametrize(("rule", "name"), [(PowerEMA(), "power_ema"), (Own(), "Own")])
def test_a_rule_is_named_as_in_configurations_and_another_by_its_class(rule, name):
    assert rule_name(rule.plan(1000)) == name


def test_a_plan_that_names_no_rule_goes_by_its_own_class():
    assert rule_name(replace(SWA().plan(1000), rule=None)) == type(SWA().plan(1000)).__name__
