from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny_training import make_classifier, make_loader, make_rows
from torch import nn

import swaft
from swaft.averaging import attach_engine
from swaft.config import TrainConfig
from swaft.errors import TrainingError
from swaft.noise import TaskLoss
from swaft.training.loop import train
from swaft.training.meter import Meter
from swaft.training.run.position import Position
from swaft.training.schedule import build_schedule, count_optimizer_steps

pytestmark = pytest.mark.unit


class Recorder:
    """Stands in for the progress log."""

    def __init__(self) -> None:
        self.advanced = 0
        self.records: list[tuple[int, dict]] = []

    def advance(self) -> None:
        self.advanced += 1

    def training(self, step, record) -> None:
        self.records.append((step, dict(record)))


def run(
    make_accelerator,
    model,
    rows,
    *,
    batch_size=2,
    objective=None,
    rule=None,
    averaged=None,
    shuffle=False,
    validate=None,
    eval_steps=None,
    **changes,
):
    """Train `model` on `rows`; returns what the recorder saw, the result and the averager."""
    settings = TrainConfig(output_dir="unused", **({"logging_steps": 1, "learning_rate": 0.1} | changes))
    accelerator = make_accelerator(settings.gradient_accumulation_steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.learning_rate)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, make_loader(rows, batch_size, shuffle=shuffle)
    )
    total_steps = count_optimizer_steps(
        micro_batches=len(loader),
        accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
    )
    averager = rule and swaft.WeightAverager(model, optimizer, rule=rule, total_steps=total_steps)
    recorder = Recorder()
    result = train(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        loader=loader,
        objective=objective or TaskLoss(),
        engine=averager.engine if averager else attach_engine(model, optimizer),
        schedule=build_schedule(settings, total_steps=total_steps, averaging=rule is not None),
        settings=settings,
        progress=recorder,
        meter=Meter(accelerator),
        position=Position(),
        averager=averager,
        validate=validate,
        eval_steps=eval_steps,
    )
    return recorder, result, averager


def by_hand(model, rows, *, accumulation, rates, batch_size=2, max_grad_norm=1.0):
    """The same training in plain torch: the mean over each step's micro-batches, clipped."""
    batches = list(make_loader(rows, batch_size))
    groups = [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step, rate in enumerate(rates):
        group = groups[step % len(groups)]
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        for batch in group:
            loss = model(batch["input_ids"], batch["attention_mask"], batch["labels"]).loss
            (loss / len(group)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
    return model


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_training_equals_plain_torch_also_where_an_epoch_ends_on_fewer_micro_batches(
    make_accelerator, accumulation
):
    model, rows = make_classifier(), make_rows(10)  # 5 micro-batches: 2 + 2 + 1, or 4 + 1
    expected = copy.deepcopy(model)
    recorder, result, _ = run(
        make_accelerator, model, rows, gradient_accumulation_steps=accumulation, num_train_epochs=2.0
    )
    rates = [record["learning_rate"] for _, record in recorder.records]
    assert result.steps == result.applied_steps == len(rates) == 2 * -(-5 // accumulation)
    by_hand(expected, rows, accumulation=accumulation, rates=rates)
    for trained, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(trained, wanted, rtol=1e-6, atol=1e-7)


def test_each_step_uses_the_rate_of_the_schedule_once(make_accelerator):
    recorder, _, _ = run(
        make_accelerator,
        make_classifier(),
        make_rows(8),
        gradient_accumulation_steps=2,
        max_steps=4,
        lr_scheduler_type="linear",
        warmup_steps=0,
        learning_rate=1.0,
    )
    assert [record["learning_rate"] for _, record in recorder.records] == [1.0, 0.75, 0.5, 0.25]


def test_max_steps_ends_the_run_inside_an_epoch(make_accelerator):
    recorder, result, _ = run(make_accelerator, make_classifier(), make_rows(10), max_steps=3)
    assert result.steps == recorder.advanced == 3


def test_gradients_are_clipped_and_their_norm_before_clipping_is_logged(make_accelerator):
    model, rows = make_classifier(), make_rows(4)
    before = copy.deepcopy(model)
    recorder, _, _ = run(
        make_accelerator, model, rows, max_steps=1, max_grad_norm=1e-3, learning_rate=1.0, warmup_steps=0
    )
    moved = torch.cat(
        [(a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    )
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)
    assert recorder.records[0][1]["grad_norm"] > 1e-2


def test_a_limit_of_zero_clips_nothing(make_accelerator):
    model, rows = make_classifier(), make_rows(4)
    expected = by_hand(copy.deepcopy(model), rows, accumulation=1, rates=[1.0], max_grad_norm=float("inf"))
    run(make_accelerator, model, rows, max_steps=1, max_grad_norm=0.0, learning_rate=1.0, warmup_steps=0)
    torch.testing.assert_close(model.head.weight, expected.head.weight)


def test_a_loss_that_is_not_finite_stops_training_before_the_step_is_taken(make_accelerator):
    model = make_classifier()
    seen: list[dict[str, torch.Tensor]] = []

    def poisoned(model, batch):
        out = TaskLoss()(model, batch)
        seen.append(copy.deepcopy(model.state_dict()))
        if len(seen) == 3:  # the first micro-batch of step 2; noticed before that step's only update
            out = SimpleNamespace(**{**vars(out), "loss": out.loss * float("nan")})
        return out

    with pytest.raises(
        TrainingError, match=r"step 2 is not finite \(learning rate 0\.1, mixed precision no\)"
    ):
        run(
            make_accelerator,
            model,
            make_rows(8),
            objective=poisoned,
            gradient_accumulation_steps=2,
            warmup_steps=0,
            lr_scheduler_type="constant",
        )
    assert len(seen) == 4
    for name, value in model.state_dict().items():
        assert torch.equal(value, seen[2][name])


def test_the_averager_sees_every_optimizer_step_and_no_micro_batch(make_accelerator):
    model = make_classifier()
    _, result, averager = run(
        make_accelerator,
        model,
        make_rows(8),
        gradient_accumulation_steps=2,
        num_train_epochs=2.0,
        rule=swaft.SWA(start=1, every=1),
    )
    assert averager.applied_steps == result.steps == 4
    assert averager.num_averaged == 4


def test_evaluation_in_between_changes_nothing_in_training(make_accelerator):
    rows = make_rows(8)
    plain, watched = make_classifier(dropout=True), make_classifier(dropout=True)
    torch.manual_seed(5)
    run(make_accelerator, plain, rows, rule=swaft.SWA(start=1), shuffle=True)
    torch.manual_seed(5)
    evaluated = []

    def validate(step: int) -> bool:
        evaluated.append(step)
        watched.eval()
        watched(**{name: value for name, value in next(iter(make_loader(rows, 8))).items() if name != "idx"})
        watched.train()
        return False

    _, result, _ = run(
        make_accelerator,
        watched,
        rows,
        rule=swaft.SWA(start=1),
        validate=validate,
        eval_steps=5,
        shuffle=True,
    )
    assert evaluated == [5, 10]  # and not after the last of 12 steps, when the run is evaluated anyway
    assert not result.stopped_early
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name])


def test_logged_losses_are_means_over_the_micro_batches_since_the_last_line(make_accelerator):
    frozen = {
        "learning_rate": 1e-30,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1.0,
    }
    each, _, _ = run(make_accelerator, make_classifier(), make_rows(8), **frozen)
    both, _, _ = run(make_accelerator, make_classifier(), make_rows(8), **frozen, logging_steps=2)
    losses = [record["loss"] for _, record in each.records]
    assert [step for step, _ in both.records] == [2, 4]
    assert both.records[1][1]["loss"] == pytest.approx((losses[2] + losses[3]) / 2, rel=1e-12)


def test_an_evaluation_that_says_so_ends_the_run(make_accelerator):
    recorder, result, averager = run(
        make_accelerator,
        make_classifier(),
        make_rows(8),
        rule=swaft.SWA(start=1),
        validate=lambda step: step == 4,
        eval_steps=2,
        num_train_epochs=3.0,
    )
    assert (result.steps, result.applied_steps, recorder.advanced) == (4, 4, 4)
    assert result.stopped_early
    assert averager.num_averaged == 4
