"""What 100,000 updates of an average lose to rounding: each arithmetic on the same random walk, against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch.optim.swa_utils import get_swa_multi_avg_fn

from swaft.averaging.arithmetic import update_
from swaft.averaging.host import Mean, plain_mean, simulate
from swaft.averaging.rules import EMA, SWA

LEARNING_RATES = (1e-5, 1e-6)
DECAY = 0.9999
SEED = 0
BARS = {"displacement_share": 1e-6, "mean_ulps": 0.3}

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
        "uniform, compensated (swaft)": (uniform, _compensated),
        "uniform, plain fp32 (swaft)": (uniform, plain_mean),
        "uniform, torch AveragedModel fp32": (uniform, lambda: _of_torch(torchs, torch.float32)),
        "uniform, torch AveragedModel bf16": (uniform, lambda: _of_torch(torchs, torch.bfloat16)),
        f"EMA {DECAY}, compensated (swaft)": (ema, _compensated),
        f"EMA {DECAY}, timm's form fp32": (ema, lambda: _of_torch(timms, torch.float32)),
        f"EMA {DECAY}, timm's form bf16": (ema, lambda: _of_torch(timms, torch.bfloat16)),
    }
    errors = {
        f"{learning_rate:g}": {
            name: asdict(simulate(plan, make(), learning_rate=learning_rate, numel=numel, seed=SEED))
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


def _compensated() -> Mean:
    """The running mean of swaft, in the tensor operations that its compiled loops equal bit for bit."""
    held: list[torch.Tensor] = []

    def update(member: np.ndarray, weight: float) -> np.ndarray:
        taken = torch.from_numpy(member)
        held[:] = held or [torch.empty_like(taken), torch.empty_like(taken, dtype=torch.bfloat16)]
        update_(*held, taken, weight)
        return held[0].numpy()

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
