from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import faults, start_ranks
from uneven_texts import MODELS, OBJECTIVES, distance, loader_of, reference_file, sgd, train_prepared

from swaft.training.accumulation import count_rows, loss_factors, step_batches

CASES = [(kind, objective) for kind in MODELS for objective in OBJECTIVES]


def trained(make_accelerator, kind, objective, *, batch_size, accumulation, count=24):
    """Weights after training in one process, and what was logged."""
    accelerator = make_accelerator(accumulation)
    model = MODELS[kind](dropout=0.0)
    model, optimizer, loader = accelerator.prepare(
        model, sgd(model), loader_of(kind, count=count, batch_size=batch_size)
    )
    recorder = train_prepared(accelerator, model, optimizer, loader, objective)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, recorder.records


@pytest.mark.unit
@pytest.mark.parametrize(("kind", "objective"), CASES)
def test_eight_rows_at_once_train_as_eight_micro_batches_of_one(make_accelerator, kind, objective):
    count = 21  # so that an epoch ends on a batch of 5
    whole, logged = trained(make_accelerator, kind, objective, batch_size=8, accumulation=1, count=count)
    for batch_size, accumulation in ((1, 8), (4, 2)):
        parts, logged_parts = trained(
            make_accelerator, kind, objective, batch_size=batch_size, accumulation=accumulation, count=count
        )
        assert distance(parts, whole) < 1e-6
        for name in ("loss", "task_loss", "divergence", "grad_norm"):
            found = [record[name] for record in logged_parts]
            assert found == pytest.approx([record[name] for record in logged], rel=2e-5), name
    start = dict(MODELS[kind](dropout=0.0).named_parameters())
    assert distance({name: start[name].detach() for name in whole}, whole) > 1e-2


@pytest.mark.distributed
@pytest.mark.timeout(280)
def test_two_ranks_train_as_one_process_that_sees_the_rows_of_both(make_accelerator, tmp_path):
    for kind, objective in CASES:
        whole, _ = trained(make_accelerator, kind, objective, batch_size=8, accumulation=1)
        torch.save(whole, reference_file(tmp_path, kind, objective))
    worker = Path(__file__).parent / "accumulation_worker.py"
    findings = start_ranks(worker, tmp_path / "findings.json", timeout_s=240)
    assert not faults(findings, "ddp", checks=2 * len(CASES))
    assert not faults(findings, "zero2", checks=2)


@pytest.mark.unit
def test_steps_take_micro_batches_in_turn_and_the_last_of_an_epoch_what_is_left():
    steps = step_batches([0, 1, 2, 3, 4], 2)  # type: ignore[arg-type]
    assert [next(steps) for _ in range(4)] == [(0, 2, [0, 1]), (0, 4, [2, 3]), (0, 5, [4]), (1, 2, [0, 1])]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ({"input_ids": torch.ones(3, 5), "labels": torch.tensor([0, 1, -100])}, 2),
        ({"input_ids": torch.ones(3, 5), "labels": torch.tensor([[4, -100], [5, 6], [-100, -100]])}, 3),
        ({"input_ids": torch.ones(2, 5), "labels": torch.tensor([-100.0, 0.5])}, 2),  # a score like any other
        ({"input_ids": torch.ones(4, 5), "start_positions": torch.zeros(4)}, 4),
    ],
)
def test_what_counts_are_labels_that_are_not_masked_scores_and_examples_with_positions(batch, count):
    assert count_rows(batch).item() == count


@pytest.mark.unit
@pytest.mark.parametrize("counts", [[7], [3, 3, 3], [16, 16]])
def test_equal_counts_leave_the_loss_as_it_is_bit_for_bit(counts):
    accelerator = SimpleNamespace(
        num_processes=2,
        gradient_accumulation_steps=len(counts),
        reduce=lambda number, reduction: 2 * number,
    )
    factors = loss_factors([torch.tensor(count) for count in counts], accelerator)  # type: ignore[arg-type]
    assert torch.equal(factors, torch.ones(len(counts)))
