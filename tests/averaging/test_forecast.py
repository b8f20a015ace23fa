"""A hundred thousand updates, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from swaft.averaging import native
from swaft.averaging.host import plain_mean, simulate
from swaft.averaging.rules import SWA

pytestmark = pytest.mark.unit


def compensated_mean():
    """A running mean as training keeps it."""
    mean, words = np.empty(0, np.float32), np.empty(0, np.uint16)

    def update(member, weight):
        nonlocal mean, words
        if weight == 1.0:
            mean, words = np.empty_like(member), np.empty(member.size, np.uint16)
        table = (np.array([member.ctypes.data]), np.array([0]), np.array([member.size]))
        native.update(*table, mean, words, weight)
        return mean

    return update


@pytest.mark.parametrize("learning_rate", [1e-5, 1e-6])
def test_a_hundred_thousand_events_end_within_a_millionth_of_the_displacement(learning_rate):
    plan = SWA(start=0).plan(99_999)
    error = simulate(plan, compensated_mean(), learning_rate=learning_rate, numel=512)
    assert error.displacement_share <= 1e-6
    assert error.mean_ulps <= 0.3


def test_the_plain_form_would_miss_that_bar_and_its_forecast_says_so():
    plan = SWA(start=0).plan(99_999)
    error = simulate(plan, plain_mean(), learning_rate=1e-6)
    assert error.displacement_share > 1e-4
    assert error.mean_ulps > 100


def test_a_forecast_for_a_long_run_simulates_its_beginning():
    taken, mean = [], plain_mean()
    plan = SWA(start=0).plan(500_000)
    error = simulate(plan, lambda *each: taken.append(each) or mean(*each), learning_rate=1e-6, members=50)
    assert error.members == len(taken) == 50
    assert error == simulate(SWA(start=0).plan(49), plain_mean(), learning_rate=1e-6)


def test_the_forecast_of_the_plain_form_follows_the_arithmetic_of_training_to_the_bit():
    generator = np.random.default_rng(0)
    kept, mean = None, plain_mean()
    for n in range(50):
        member, weight = generator.standard_normal(100, dtype=np.float32), 1.0 / (n + 1)
        foreseen = mean(member, weight)
        if kept is None:
            kept = member.copy()
        else:
            table = (np.array([member.ctypes.data]), np.array([0]), np.array([member.size]))
            native.update(*table, kept, np.empty(0, np.uint16), weight)
        assert np.array_equal(foreseen, kept)
