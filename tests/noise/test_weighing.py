"""A loss that is a mean, weighed by its rows: micro-batches of a loop of one's own, and of a Trainer."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from tiny_models import (
    bart,
    bert,
    causal_batch,
    classification_batch,
    generation_batch,
    gpt2,
    gradients_of,
    t5,
)
from transformers import Trainer, TrainingArguments

from swaft.integrations.transformers import NoiseCallback
from swaft.noise import R3F, RDrop, TaskLoss, objectives

pytestmark = pytest.mark.unit

OBJECTIVES = [TaskLoss(), TaskLoss(0.1), R3F(sigma=0.1), R3F(sigma=0.1, passes="doubled"), RDrop()]
CASES = [(bert, classification_batch, 4), (t5, generation_batch, 16), (gpt2, causal_batch, 15)]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("build", "batch", "counted"), CASES)
@torch.no_grad()
def test_an_output_says_how_many_rows_its_loss_is_the_mean_of(objective, build, batch, counted):
    model, batch = build(dropout=0.0).eval(), batch()
    num_items = objective(model, batch).num_items
    assert (num_items.item(), num_items.dtype, num_items.dim()) == (counted, torch.int64, 0)
    parts = [objective(model, {name: value[rows] for name, value in batch.items()}) for rows in ([0], [1, 2])]
    assert sum(part.num_items for part in parts) == (num_items if build is not bert else 3)


def test_scores_all_count_and_so_do_texts_with_labels_of_another_name():
    model, batch = bert(num_labels=1), classification_batch()
    assert TaskLoss()(model, {**batch, "labels": torch.rand(4)}).num_items == 4
    plain = model.forward
    model.forward = lambda score, **inputs: plain(labels=score, **inputs)
    score = batch.pop("labels").float()
    assert TaskLoss()(model, {**batch, "score": score}).num_items == 4


def split(batch, sizes):
    parts = zip(*(value.split(sizes) for value in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


def test_micro_batches_weighed_by_their_rows_are_one_batch():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, batch = bart(dropout=0.0), generation_batch()
    objective = R3F(preset="relative", sigma=0.5, seed=1)
    objective._draw = lambda embedding, **_: 1.5 * embedding  # the same for a row wherever it lies
    objective(model, batch).loss.backward()
    expected = gradients_of(model)
    model.zero_grad()

    micro_batches = split(batch, [1, 2])
    total = accelerator.reduce(sum((b["labels"] != -100).sum() for b in micro_batches))
    means = accelerator.gradient_accumulation_steps * accelerator.num_processes
    for micro_batch in micro_batches:
        out = objective(model, micro_batch)
        accelerator.backward(out.loss * (out.num_items * means / total))
    torch.testing.assert_close(gradients_of(model), expected)


@pytest.mark.parametrize(("build", "batch"), [(bart, generation_batch), *(case[:2] for case in CASES[::2])])
def test_a_trainer_that_accumulates_takes_the_step_of_one_batch(build, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "add_noise", lambda embedding, **_: 1.5 * embedding)
    rows = batch(rows=4)
    dataset = [{name: value[row] for name, value in rows.items()} for row in range(4)]

    def trained(size):
        model = build(dropout=0.0)
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=str(tmp_path),
                use_cpu=True,
                max_steps=1,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=4 // size,
                learning_rate=1.0,
                optim="sgd",
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=dataset,
            callbacks=[NoiseCallback(R3F(preset="relative", sigma=0.5))],
        )
        trainer.train()
        return list(model.parameters())

    torch.testing.assert_close(trained(1), trained(4), rtol=1e-4, atol=1e-6)
