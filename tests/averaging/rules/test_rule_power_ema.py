"""Power-function averages, their snapshots, and the averages put together from them."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lane_interpreter import averages, lanes_along, random_members

from swaft.averaging.rules import PowerEMA, Readout
from swaft.averaging.rules.power_ema import SIGMA_REL_LIMIT, gamma_of, profile
from swaft.errors import AveragingError, ConfigError

pytestmark = pytest.mark.unit


def test_the_exponents_are_those_of_the_paper():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)


@given(sigma=st.floats(0.005, SIGMA_REL_LIMIT - 1e-3))
def test_sigma_rel_is_the_standard_deviation_of_the_profile_as_a_share_of_the_run(sigma):
    count = 20_000
    weights = profile(count, gamma_of(sigma), count)
    position = (np.arange(count) + 0.5) / count
    mean = weights @ position
    assert np.sqrt(weights @ (position - mean) ** 2) == pytest.approx(sigma, rel=1e-3)


@given(total=st.integers(20, 60), every=st.integers(1, 3), index=st.integers(0, 1))
def test_a_tracked_profile_is_its_recursion_all_along(total, every, index):
    plan = PowerEMA(start=2, every=every).plan(total)
    members = random_members(plan)
    sigma = plan.sigma_rel[index]
    mean, expected = np.zeros(3), []
    for t, member in enumerate(members, start=1):
        beta = (1 - 1 / t) ** (gamma_of(sigma) + 1)
        mean = beta * mean + (1 - beta) * member
        expected.append(mean)
    np.testing.assert_allclose(averages(plan, members, sigma_rel=sigma), expected, rtol=1e-10)
    assert plan.readout(total // every // 2, Readout(sigma_rel=sigma)) == {index: 1.0}


def test_without_a_choice_the_first_tracked_average_is_read():
    assert PowerEMA(sigma_rel=(0.2, 0.1)).plan(100).readout(50) == {0: 1.0}


@given(total=st.integers(3, 80), snapshots=st.integers(1, 20))
def test_snapshots_are_the_running_means_at_even_counts_and_none_at_the_end(total, snapshots):
    plan = PowerEMA(snapshots=snapshots).plan(total)
    kept, counts = {}, []
    for n, lanes in enumerate(lanes_along(plan, random_members(plan))):
        made = plan.finished(n)
        if made:
            counts.append(n + 1)
            kept |= {lane: lanes[i].copy() for i, lane in enumerate(made)}
    assert tuple(counts) == plan.snapshot_counts
    assert len(counts) == min(snapshots, total)
    assert plan.num_members not in counts
    assert max(np.diff([0, *counts, plan.num_members])) <= -(-plan.num_members // (snapshots + 1))
    for lane, copy in kept.items():
        np.testing.assert_array_equal(lanes[lane], copy)


@settings(max_examples=25)
@given(
    total=st.integers(40, 90),
    snapshots=st.integers(4, 9),
    sigma=st.floats(0.06, 0.14),
    at=st.floats(0.8, 1.0),
)
def test_a_reconstruction_is_the_best_fit_of_the_wanted_impulse_response(total, snapshots, sigma, at):
    plan = PowerEMA(snapshots=snapshots).plan(total)
    count = round(at * plan.num_members)
    # Members that are unit vectors make every lane its own impulse response.
    *_, lanes = lanes_along(plan, np.eye(plan.num_members)[:count])
    wanted = averages(PowerEMA(sigma_rel=(sigma,)).plan(total), np.eye(plan.num_members)[:count])[-1]
    coefficients, error = plan.readout(count, Readout(sigma_rel=sigma)), plan.profile_error(count, sigma)
    assert sum(coefficients.values()) == pytest.approx(1.0, abs=1e-12)
    fitted = sum(c * lanes[i] for i, c in coefficients.items())
    assert error == pytest.approx(np.linalg.norm(fitted - wanted) / np.linalg.norm(wanted), abs=1e-9)
    # At a least-squares fit under sum = 1 the residual is at right angles to every direction that keeps the sum.
    directions = np.stack([lanes[i] - lanes[0] for i in coefficients if i != 0])
    assert np.abs(directions @ (fitted - wanted)).max() < 1e-10


@pytest.mark.parametrize("sigma", [0.03, 0.06, 0.075, 0.15, 0.2])
def test_a_reconstruction_comes_within_its_profile_error_of_the_average_tracked_from_the_start(sigma):
    plan = PowerEMA().plan(400)
    members = random_members(plan)
    direct = averages(PowerEMA(sigma_rel=(sigma,)).plan(400), members)[-1]
    *_, lanes = lanes_along(plan, members)
    fitted = sum(c * lanes[i] for i, c in plan.readout(401, Readout(sigma_rel=sigma)).items())
    error = plan.profile_error(401, sigma)
    assert error < 0.04
    wanted = profile(401, gamma_of(sigma), 401)
    # Coefficients sum to 1, so only the spread of the members about any point can leak through.
    spread = np.linalg.norm(members - members[-1], axis=0)
    assert (np.abs(fitted - direct) <= error * np.linalg.norm(wanted) * spread * (1 + 1e-9)).all()


def test_the_longest_runs_are_fitted_in_time():
    plan = PowerEMA(snapshots=32).plan(100_000)
    begun = time.process_time()
    coefficients = plan.readout(plan.num_members, Readout(sigma_rel=0.07))
    assert time.process_time() - begun < 2.0
    assert len(coefficients) == 66
    assert plan.profile_error(plan.num_members, 0.07) < 1e-3


def test_what_cannot_be_fitted_is_refused_with_its_error():
    plan = PowerEMA().plan(1000)
    with pytest.raises(AveragingError, match=r"sigma_rel=0\.28 over 1001 members .* error of 0\.20"):
        plan.readout(1001, Readout(sigma_rel=0.28))
    with pytest.raises(AveragingError, match=r"more of them \(snapshots\)"):
        plan.readout(100, Readout(sigma_rel=0.2))
    assert plan.readout(1001, Readout(sigma_rel=0.2))


@pytest.mark.parametrize("sigma", [0.0, -0.1, 0.3, float("nan"), "short"])
def test_a_width_that_no_profile_has_is_refused(sigma):
    with pytest.raises(AveragingError, match="sigma_rel is"):
        PowerEMA().plan(100).readout(50, Readout(sigma_rel=sigma))


@pytest.mark.parametrize("sigmas", [(), (0.05, 0.05), (0.0, 0.1), (0.3,), ("a",), 0.1])
def test_widths_that_cannot_be_tracked_are_refused(sigmas):
    with pytest.raises(ConfigError, match="sigma_rel is"):
        PowerEMA(sigma_rel=sigmas).plan(100)


def test_no_snapshots_are_refused():
    with pytest.raises(ConfigError, match="snapshots is 0"):
        PowerEMA(snapshots=0).plan(100)
