"""What 100,000 updates of an average lose to rounding: each arithmetic on the same random walk, against float64.

The error of a plain fp32 mean comes less from single roundings than from updates too small to register, so there is
no short formula for it. A few hundred elements show it. They move as under Adam: by about the learning rate per
step, part drift, part noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch.optim.swa_utils import get_swa_multi_avg_fn

from swaft.averaging import native
from swaft.averaging.rules import EMA, SWA, Plan

LEARNING_RATES = (1e-5, 1e-6)
DECAY = 0.9999
SEED = 0
BARS = {"displacement_share": 1e-6, "mean_ulps": 0.3}
WEIGHT_SCALE = 0.02
"""Standard deviation of the first weights, as in a BERT or GPT-2 matrix."""
DRIFT = 0.1
"""Size of the steady part of a step relative to its noise."""

Mean = Callable[[np.ndarray, float], np.ndarray]
"""Takes a member (n,), fp32, and its weight; returns the mean so far."""

Update = Callable[[list[torch.Tensor], list[torch.Tensor], int], None]
"""Moves an average towards a member, given how many members it holds."""


def measure(*, quick: bool, device: str) -> dict[str, object]:
    """Error of every arithmetic at every learning rate, at the end of the run."""
    events, numel = (200, 16) if quick else (100_000, 512)
    uniform = SWA(start=0).plan(events - 1)
    ema = EMA(decay=DECAY, start=0).plan(events - 1)
    # torch ships the uniform mean with this function; timm's ModelEmaV3 calls the lerp below.
    torchs, timms = get_swa_multi_avg_fn(), _lerp
    arms = {
        "uniform, compensated (swaft)": (uniform, running_mean),
        "uniform, plain fp32 (swaft)": (uniform, partial(running_mean, compensated=False)),
        "uniform, torch AveragedModel fp32": (uniform, lambda: _of_torch(torchs, torch.float32)),
        "uniform, torch AveragedModel bf16": (uniform, lambda: _of_torch(torchs, torch.bfloat16)),
        f"EMA {DECAY}, compensated (swaft)": (ema, running_mean),
        f"EMA {DECAY}, timm's form fp32": (ema, lambda: _of_torch(timms, torch.float32)),
        f"EMA {DECAY}, timm's form bf16": (ema, lambda: _of_torch(timms, torch.bfloat16)),
    }
    errors = {
        f"{learning_rate:g}": {
            name: simulate(plan, make(), learning_rate=learning_rate, numel=numel)
            for name, (plan, make) in arms.items()
        }
        for learning_rate in LEARNING_RATES
    }
    return {
        "events": events,
        "elements": numel,
        "seed": SEED,
        "bars for the compensated form": BARS,
        "by learning rate": errors,
    }


def rows(result: dict) -> list[Sequence[object]]:
    """The printed table."""
    return [
        (
            f"lr {rate}: {name}",
            f"{error['displacement_share']:.1e} of displacement",
            f"{error['mean_ulps']:.3g} ulp",
        )
        for rate, errors in result["by learning rate"].items()
        for name, error in errors.items()
    ]


def simulate(plan: Plan, mean: Mean, *, learning_rate: float, numel: int) -> dict[str, float]:
    """Average a random walk with a given arithmetic and in float64, and compare.

    Args:
        plan: of one running mean; gives the number of members and their weights.
        mean: the arithmetic under test.
        learning_rate: size of a step.
        numel: number of elements.

    Returns:
        `displacement_share`, the norm of the error as a share of how far the exact mean has moved from the first
        member, and `mean_ulps`, the mean error in units in the last place of fp32, of which rounding the exact mean
        costs a quarter.
    """
    generator = np.random.default_rng(SEED)
    member = (WEIGHT_SCALE * generator.standard_normal(numel)).astype(np.float32)
    drift = (learning_rate * DRIFT * generator.standard_normal(numel)).astype(np.float32)
    exact = first = member.astype(np.float64)
    result = mean(member, 1.0)
    for n in range(1, plan.num_members):
        noise = generator.standard_normal(numel, dtype=np.float32)
        member = member + (drift + np.float32(learning_rate) * noise)
        for weight in (update.weight for update in plan.updates(n)):
            exact = exact + weight * (member - exact)
            result = mean(member, weight)
    error = np.abs(result - exact)
    return {
        "displacement_share": float(np.linalg.norm(error) / np.linalg.norm(exact - first)),
        "mean_ulps": float(np.mean(error / np.spacing(np.abs(exact).astype(np.float32)))),
    }


def running_mean(*, compensated: bool = True) -> Mean:
    """A running mean of swaft, by the loops that training uses."""
    mean, words = np.empty(0, np.float32), np.empty(0, np.uint16)

    def update(member: np.ndarray, weight: float) -> np.ndarray:
        nonlocal mean, words
        if weight == 1.0:
            mean, words = np.empty_like(member), np.empty(member.size * compensated, np.uint16)
        table = (np.array([member.ctypes.data]), np.array([0]), np.array([member.size]))
        native.update(*table, mean, words, weight)
        return mean

    return update


def _of_torch(average: Callable[..., None], dtype: torch.dtype) -> Mean:
    """A function of torch's signature (averages, members, members so far), on tensors of one dtype."""
    held: list[torch.Tensor] = []
    count = 0

    def update(member: np.ndarray, weight: float) -> np.ndarray:
        nonlocal count
        taken = torch.from_numpy(member).to(dtype)
        if held:
            average(held, [taken], count)
        else:
            held.append(taken.clone())
        count += 1
        return held[0].float().numpy()

    return update


def _lerp(averages: list[torch.Tensor], members: list[torch.Tensor], _: int) -> None:
    torch._foreach_lerp_(averages, members, weight=1.0 - DECAY)  # pyright: ignore[reportPrivateImportUsage]
