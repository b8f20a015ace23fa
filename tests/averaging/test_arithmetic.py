from __future__ import annotations

import pytest
import torch

from swaft.averaging.arithmetic import combine, reference_mean, update_, update_plain_
from swaft.averaging.rules import EMA, SWA

pytestmark = pytest.mark.unit


def walk(numel: int, steps: int, *, learning_rate: float, seed: int = 0):
    """Weights of an Adam-like walk, fp32, one tensor a step."""
    generator = torch.Generator().manual_seed(seed)
    weights = 0.02 * torch.randn(numel, generator=generator)
    for _ in range(steps):
        yield weights.clone()
        weights += learning_rate * torch.randn(numel, generator=generator).clamp(-1, 1)


def weight_of(plan):
    return lambda n: plan.updates(n)[0].weight


def averaged(members, weight):
    """The mean after every member."""
    m, c = torch.empty_like(members[0]), torch.empty_like(members[0], dtype=torch.bfloat16)
    for n, x in enumerate(members):
        update_(m, c, x, weight(n))
        yield m


def ulps(mean: torch.Tensor, oracle: torch.Tensor, largest: torch.Tensor) -> float:
    """Largest error, in units in the last place of the largest weight that an element has had so far.

    An element that walks through zero has no digits of its own to lose: there the error is that of its steps.
    """
    spacing = torch.nextafter(largest, torch.tensor(torch.inf)) - largest
    return float(((mean.double() - oracle).abs() / spacing.double()).max())


@pytest.mark.parametrize("learning_rate", [1e-3, 1e-5, 1e-6])
def test_a_thousand_uniform_updates_stay_within_one_ulp_of_float64(learning_rate):
    members = list(walk(4096, 1000, learning_rate=learning_rate))
    total, largest = torch.zeros(4096, dtype=torch.float64), torch.zeros(4096)
    for n, mean in enumerate(averaged(members, weight_of(SWA(start=0).plan(1000)))):
        total += members[n].double()
        largest = torch.maximum(largest, members[n].abs())
        assert ulps(mean, total / (n + 1), largest) <= 1.0


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_a_thousand_ema_updates_stay_within_one_ulp_of_float64(decay):
    weight = weight_of(EMA(decay=decay).plan(1000))
    members = list(walk(4096, 1000, learning_rate=1e-5))
    oracle, largest = members[0].double(), torch.zeros(4096)
    for n, mean in enumerate(averaged(members, weight)):
        oracle += weight(n) * (members[n].double() - oracle)
        largest = torch.maximum(largest, members[n].abs())
        assert ulps(mean, oracle, largest) <= 1.0


def test_a_plain_running_mean_would_not_pass_that_bar():
    """The control: without the compensation word the error is many units, so the bar above can fail."""
    members = list(walk(4096, 1000, learning_rate=1e-6))
    mean, total = members[0].clone(), torch.zeros(4096, dtype=torch.float64)
    for n, member in enumerate(members):
        update_plain_(mean, member, 1.0 / (n + 1))
        total += member.double()
    assert ulps(mean, total / len(members), torch.stack(members).abs().amax(0)) > 2.0


def test_the_mean_of_equal_weights_is_those_weights_bit_for_bit():
    member = torch.randn(257)
    mean = reference_mean([member] * 100, map(weight_of(SWA(start=0).plan(99)), range(100)))
    assert torch.equal(mean.view(torch.int32), member.view(torch.int32))


def test_weights_far_apart_lose_no_digits():
    members = [torch.full((8,), value) for value in (0.0, 3.0, 1e-3, -2e4, 5e-8)]
    for n, mean in enumerate(averaged(members, weight_of(SWA(start=0).plan(9)))):
        oracle = torch.stack(members[: n + 1]).double().mean(0)
        assert ulps(mean, oracle, torch.stack(members[: n + 1]).abs().amax(0)) <= 1.0


def test_a_combination_is_rounded_once():
    m, c = torch.tensor([1.0]), torch.tensor([2.0**-26]).bfloat16()
    expected = torch.tensor([0.3 * (1 + 2.0**-26) + 0.7 * 3.0], dtype=torch.float64).float()
    assert torch.equal(combine([(0.3, m, c), (0.7, torch.tensor([3.0]), None)]), expected)
