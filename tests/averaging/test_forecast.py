"""A hundred thousand updates, against float64."""

from __future__ import annotations

import pytest

from swaft.averaging.forecast import native_mean, simulate
from swaft.averaging.rules import SWA

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("learning_rate", [1e-5, 1e-6])
def test_a_hundred_thousand_events_end_within_a_millionth_of_the_displacement(learning_rate):
    plan = SWA(start=0).plan(99_999)
    error = simulate(plan, native_mean(compensated=True), learning_rate=learning_rate, numel=512)
    assert error.displacement_share <= 1e-6
    assert error.mean_ulps <= 0.3


def test_the_plain_form_would_miss_that_bar_and_its_forecast_says_so():
    plan = SWA(start=0).plan(99_999)
    error = simulate(plan, native_mean(compensated=False), learning_rate=1e-6)
    assert error.displacement_share > 1e-4
    assert error.mean_ulps > 100
