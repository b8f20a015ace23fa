"""A hundred thousand updates by the loops of training, against float64."""

from __future__ import annotations

import pytest

from benchmarks.averaging_error import BARS, running_mean, simulate
from swaft.averaging.rules import SWA

pytestmark = pytest.mark.unit
PLAN = SWA(start=0).plan(99_999)


@pytest.mark.parametrize("learning_rate", [1e-5, 1e-6])
def test_a_hundred_thousand_events_end_within_a_millionth_of_the_displacement(learning_rate):
    error = simulate(PLAN, running_mean(), learning_rate=learning_rate, numel=512)
    assert all(error[name] <= bar for name, bar in BARS.items())


def test_the_plain_form_would_miss_that_bar():
    error = simulate(PLAN, running_mean(compensated=False), learning_rate=1e-6, numel=256)
    assert error["displacement_share"] > 1e-4
    assert error["mean_ulps"] > 100
