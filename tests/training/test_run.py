"""What the loop of the recipes does to the weights, and what it logs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_loop import SMALL
from tiny_training import make_classifier, make_rows
from torch import nn
from torch.utils.data import default_collate

import swaft
from swaft.training.data.classification import ClassificationEvalConfig
from swaft.training.data.loaders import shuffled
from swaft.training.evaluation.evaluate import Evaluation

pytestmark = pytest.mark.unit
BATCH = SMALL["per_device_train_batch_size"]


def batches_of(rows: list[dict[str, Any]], *, epoch: int) -> list[dict[str, Any]]:
    """The batches of a pass, in the order that a run takes them."""
    order = shuffled(len(rows), seed=42)
    order.set_epoch(epoch)
    chosen = [rows[i] for i in order]
    return [default_collate(chosen[i : i + BATCH]) for i in range(0, len(chosen), BATCH)]


def by_hand(model, rows, *, accumulation, rates, max_grad_norm=1.0):
    """The same training in plain torch: the mean over each step's micro-batches, clipped."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    a_pass = -(-len(rows) // (BATCH * accumulation))
    for number, rate in enumerate(rates):
        batches = batches_of(rows, epoch=number // a_pass)
        first = number % a_pass * accumulation
        group = batches[first : first + accumulation]
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        for batch in group:
            loss = model(batch["input_ids"], batch["attention_mask"], batch["labels"]).loss
            (loss / len(group)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
    return model


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_training_equals_plain_torch_also_where_an_epoch_ends_on_fewer_micro_batches(run, accumulation):
    model, rows = make_classifier(), make_rows(10)  # 5 micro-batches: 2 + 2 + 1, or 4 + 1
    expected = copy.deepcopy(model)
    done = run(model, rows, gradient_accumulation_steps=accumulation, num_train_epochs=2.0)
    rates = [record["learning_rate"] for record in done.records]
    assert done.position.step == done.steps == len(rates) == 2 * -(-5 // accumulation)
    by_hand(expected, rows, accumulation=accumulation, rates=rates)
    for trained, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(trained, wanted, rtol=1e-6, atol=1e-7)


def test_each_step_uses_the_rate_of_the_schedule_once(run):
    done = run(
        make_classifier(),
        make_rows(8),
        gradient_accumulation_steps=2,
        max_steps=4,
        lr_scheduler_type="linear",
        warmup_steps=0,
        learning_rate=1.0,
    )
    assert [record["learning_rate"] for record in done.records] == [1.0, 0.75, 0.5, 0.25]


def test_max_steps_ends_the_run_inside_an_epoch(run):
    done = run(make_classifier(), make_rows(10), max_steps=3)
    assert done.position.step == len(done.records) == 3


def test_gradients_are_clipped_and_their_norm_before_clipping_is_logged(run):
    model, rows = make_classifier(), make_rows(4)
    before = copy.deepcopy(model)
    done = run(model, rows, max_steps=1, max_grad_norm=1e-3, learning_rate=1.0, warmup_steps=0)
    moved = torch.cat(
        [(a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    )
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)
    assert done.records[0]["grad_norm"] > 1e-2


def test_a_limit_of_zero_clips_nothing(run):
    model, rows = make_classifier(), make_rows(4)
    expected = by_hand(copy.deepcopy(model), rows, accumulation=1, rates=[1.0], max_grad_norm=float("inf"))
    run(model, rows, max_steps=1, max_grad_norm=0.0, learning_rate=1.0, warmup_steps=0)
    torch.testing.assert_close(model.head.weight, expected.head.weight)


def test_the_averager_sees_every_optimizer_step_and_no_micro_batch(run):
    done = run(
        make_classifier(),
        make_rows(8),
        gradient_accumulation_steps=2,
        num_train_epochs=2.0,
        rule=swaft.SWA(start=1, every=1),
    )
    assert done.averager.applied_steps == done.position.step == 4
    assert done.averager.num_averaged == 4


def test_evaluation_in_between_changes_nothing_in_training(run):
    rows = make_rows(8)
    plain, watched = make_classifier(dropout=True), make_classifier(dropout=True)
    run(plain, rows, rule=swaft.SWA(start=1))
    evaluated = []

    def evaluate(split: str, readout: object) -> dict[str, Evaluation]:
        evaluated.append((split, readout))
        watched.eval()
        watched(**{name: value for name, value in default_collate(rows).items() if name != "idx"})
        watched.train()
        return {"last": Evaluation(scores={"accuracy": 0.5})}

    done = run(
        watched,
        rows,
        rule=swaft.SWA(start=1),
        evaluate=evaluate,
        evaluation=ClassificationEvalConfig(eval_steps=5),
    )
    # Not after the last of 12 steps, when the run is evaluated anyway.
    assert evaluated == [("validation", swaft.Readout())] * 2
    assert not done.position.stopped
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name])


def test_logged_losses_are_means_over_the_micro_batches_since_the_last_line(run):
    frozen = {
        "learning_rate": 1e-30,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1.0,
    }
    each = run(make_classifier(), make_rows(8), **frozen).records
    both = run(make_classifier(), make_rows(8), **frozen, logging_steps=2).records
    losses = [record["loss"] for record in each]
    assert [record["step"] for record in both] == [2, 4]
    assert both[1]["loss"] == pytest.approx((losses[2] + losses[3]) / 2, rel=1e-12)


def test_an_evaluation_that_says_so_ends_the_run(run):
    done = run(
        make_classifier(),
        make_rows(8),
        rule=swaft.SWA(start=1),
        evaluate=lambda split, readout: {
            kind: Evaluation(scores={"accuracy": 0.5}) for kind in ("last", "averaged")
        },
        evaluation=ClassificationEvalConfig(eval_steps=2, early_stopping_patience=1),
        num_train_epochs=3.0,
    )
    assert (done.position.step, done.steps) == (4, 4)  # the second evaluation is no better than the first
    assert done.position.stopped
    assert done.averager.num_averaged == 4
