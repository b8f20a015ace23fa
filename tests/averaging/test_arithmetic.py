from __future__ import annotations

import pytest
import torch

from swaft.averaging.arithmetic import make_scratch, update_mean_
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


def averaged(members, weight, *, chunk=None):
    mean = compensation = scratch = None
    for n, member in enumerate(members):
        if mean is None:
            mean, compensation = torch.empty_like(member), torch.empty_like(member, dtype=torch.bfloat16)
            scratch = make_scratch(member.numel())
        size = chunk or member.numel()
        for a in range(0, member.numel(), size):
            window = slice(a, a + size)
            update_mean_(mean[window], compensation[window], member[window], weight(n), scratch=scratch)
        yield mean


def ulps(mean: torch.Tensor, oracle: torch.Tensor, member: torch.Tensor | None = None) -> float:
    """Largest error in units in the last place of the mean (or of the new weights, where those are larger:
    a mean that crosses zero has no digits of its own to lose)."""
    exact = oracle.abs().float() if member is None else torch.maximum(oracle.abs().float(), member.abs())
    spacing = torch.nextafter(exact, torch.tensor(torch.inf)) - exact
    return float(((mean.double() - oracle).abs() / spacing.double()).max())


@pytest.mark.parametrize("learning_rate", [1e-3, 1e-5, 1e-6])
def test_a_thousand_uniform_updates_stay_within_one_ulp_of_float64(learning_rate):
    plan = SWA(start=0).plan(1000)
    members = list(walk(4096, 1000, learning_rate=learning_rate))
    total = torch.zeros(4096, dtype=torch.float64)
    for n, mean in enumerate(averaged(members, weight_of(plan))):
        total += members[n].double()
        assert ulps(mean, total / (n + 1), members[n]) <= 1.0


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_a_thousand_ema_updates_stay_within_one_ulp_of_float64(decay):
    plan = EMA(decay=decay).plan(1000)
    members = list(walk(4096, 1000, learning_rate=1e-5))
    oracle = None
    for n, mean in enumerate(averaged(members, weight_of(plan))):
        member = members[n].double()
        oracle = member if oracle is None else oracle + weight_of(plan)(n) * (member - oracle)
        assert ulps(mean, oracle, members[n]) <= 1.0


def test_a_plain_running_mean_would_not_pass_that_bar():
    """The control: without the compensation word the error is many units, so the bar above can fail."""
    members = list(walk(4096, 1000, learning_rate=1e-6))
    mean, total = members[0].clone(), torch.zeros(4096, dtype=torch.float64)
    for n, member in enumerate(members):
        mean.lerp_(member, 1.0 / (n + 1))
        total += member.double()
    assert ulps(mean, total / len(members), members[-1]) > 2.0


def test_the_bits_do_not_depend_on_how_the_shard_is_cut():
    members = list(walk(1001, 50, learning_rate=1e-4))
    weight = weight_of(SWA(start=0).plan(50))
    whole = [mean.clone() for mean in averaged(members, weight)]
    for chunk in (1, 7, 16, 999):
        pieces = list(averaged(members, weight, chunk=chunk))
        assert torch.equal(pieces[-1].view(torch.int32), whole[-1].view(torch.int32))


def test_the_mean_of_equal_weights_is_those_weights_bit_for_bit():
    member = torch.randn(257)
    *_, mean = averaged([member] * 100, weight_of(SWA(start=0).plan(100)))
    assert torch.equal(mean.view(torch.int32), member.view(torch.int32))


def test_a_large_first_step_is_not_lost():
    members = [torch.zeros(8), torch.full((8,), 3.0), torch.full((8,), 1e-3)]
    *_, mean = averaged(members, weight_of(SWA(start=0).plan(3)))
    assert ulps(mean, torch.full((8,), (3.0 + float(torch.tensor(1e-3))) / 3, dtype=torch.float64)) <= 1.0
