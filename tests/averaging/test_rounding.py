"""A hundred thousand updates, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swaft.averaging import native
from swaft.averaging.host.lanes import bits
from swaft.averaging.rounding import plain_mean, simulate
from swaft.averaging.rules import SWA

pytestmark = pytest.mark.unit


def compensated_mean():
    m = c = None

    def update(member, weight):
        nonlocal m, c
        if m is None or weight == 1.0:
            m, c = member.copy(), bits(torch.zeros(member.size, dtype=torch.bfloat16))
        else:
            here = (np.array([member.ctypes.data]), np.array([0]), np.array([member.size]))
            native.update(*here, m, c, np.float32(weight))
        return m

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
