from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from swaft.errors import ConfigError
from swaft.training.config import TrainConfig
from swaft.training.models.build import (
    build_schedule,
    count_optimizer_steps,
    rate_factors,
    warmup_length,
)

pytestmark = pytest.mark.unit


def settings(**changes) -> TrainConfig:
    return TrainConfig(output_dir="unused", **changes)


def transformers_rates(kind: str, *, peak: float, warmup: int, total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_every_rate_is_the_one_transformers_would_use(kind, warmup):
    schedule = build_schedule(
        settings(lr_scheduler_type=kind, warmup_steps=warmup, learning_rate=3e-5),
        total_steps=23,
        averaging=False,
    )
    expected = transformers_rates(kind, peak=3e-5, warmup=warmup, total=23)
    assert [schedule(step) for step in range(23)] == expected


def test_auto_is_constant_after_warmup_when_weights_are_averaged_and_linear_otherwise():
    assert build_schedule(settings(), total_steps=100, averaging=True).kind == "constant_with_warmup"
    assert build_schedule(settings(), total_steps=100, averaging=False).kind == "linear"


def test_a_schedule_chosen_by_name_stays_when_weights_are_averaged():
    chosen = settings(lr_scheduler_type="cosine")
    assert build_schedule(chosen, total_steps=100, averaging=True).kind == "cosine"


def test_linear_decay_never_falls_below_zero_past_the_end():
    schedule = build_schedule(settings(lr_scheduler_type="linear"), total_steps=10, averaging=False)
    assert schedule(10) == 0.0
    assert schedule(12) == 0.0


def test_a_share_of_the_run_is_rounded_up_to_whole_warmup_steps():
    assert warmup_length(0.06, 101) == 7
    assert warmup_length(0.0, 101) == 0
    assert warmup_length(5, 101) == 5
    assert warmup_length(0.07, 100) == 7  # 0.07 * 100 is 7.000000000000001 in floats


@pytest.mark.parametrize(
    ("rates", "factors"),
    [([1e-3, 1e-3], [1.0, 1.0]), ([2e-5, 2e-3], [1.0, 100.0]), ([None, None], [1.0, 1.0])],
)
def test_only_groups_with_different_rates_have_their_own_share_of_the_schedule(rates, factors):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in rates]
    optimizer = torch.optim.AdamW([{"params": [p]} for p in parameters])
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    assert rate_factors(optimizer, 2e-5) == pytest.approx(factors)


@pytest.mark.parametrize(
    ("micro_batches", "accumulation", "epochs", "max_steps", "expected"),
    [
        (10, 1, 3.0, -1, 30),
        (10, 4, 3.0, -1, 9),  # 2 whole steps and one of 2 micro-batches an epoch
        (10, 4, 0.5, -1, 2),
        (3, 8, 2.0, -1, 2),  # an epoch shorter than one accumulation is one step
        (10, 4, 3.0, 5, 5),
        (10, 1, 1.1, -1, 11),  # the Trainer: 12, for 1.1 * 10 is 11.000000000000002 in floats
    ],
)
def test_optimizer_steps_are_counted_as_the_trainer_counts_them(
    micro_batches, accumulation, epochs, max_steps, expected
):
    train = settings(gradient_accumulation_steps=accumulation, num_train_epochs=epochs, max_steps=max_steps)
    assert count_optimizer_steps(train, micro_batches) == expected


def test_a_run_that_would_be_all_warmup_is_refused():
    with pytest.raises(ConfigError, match=r"train\.warmup_steps=0\.06 makes 1 of the run's 1 steps"):
        build_schedule(settings(), total_steps=1, averaging=False)
    assert build_schedule(settings(warmup_steps=0), total_steps=1, averaging=False)(0) == 2e-5
