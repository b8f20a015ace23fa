from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from harness import faults, start_ranks
from torch.utils.data import DataLoader
from uneven_texts import MODELS, OBJECTIVES, distance, loader_of, reference_file, sgd, train_prepared

from swaft.training.run.step import count_rows, count_tokens, loss_factors, step_batches

CASES = [(kind, objective) for kind in MODELS for objective in OBJECTIVES]


def trained(make_accelerator, kind, objective, *, batch_size, accumulation):
    """Weights after training in one process, and what was logged."""
    accelerator = make_accelerator(accumulation)
    model = MODELS[kind](dropout=0.0)
    model, optimizer, loader = accelerator.prepare(model, sgd(model), loader_of(kind, batch_size=batch_size))
    logged = train_prepared(accelerator, model, optimizer, loader, objective)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, logged


@pytest.mark.unit
@pytest.mark.parametrize(("kind", "objective"), CASES)
def test_eight_rows_at_once_train_as_eight_micro_batches_of_one(make_accelerator, kind, objective):
    whole, logged = trained(make_accelerator, kind, objective, batch_size=8, accumulation=1)
    for batch_size, accumulation in ((1, 8), (4, 2)):
        parts, logged_parts = trained(
            make_accelerator, kind, objective, batch_size=batch_size, accumulation=accumulation
        )
        assert distance(parts, whole) < 1e-6
        for name in logged[0].keys() & {"loss", "task_loss", "divergence", "grad_norm"}:
            found = [record[name] for record in logged_parts]
            assert found == pytest.approx([record[name] for record in logged], rel=2e-5), name
    start = dict(MODELS[kind](dropout=0.0).named_parameters())
    assert distance({name: start[name].detach() for name in whole}, whole) > 1e-2


@pytest.mark.distributed
@pytest.mark.timeout(280)
def test_two_ranks_train_as_one_process_though_the_last_rows_of_an_epoch_fill_no_batch(
    make_accelerator, tmp_path
):
    for kind, objective in CASES:
        torch.save(
            trained(make_accelerator, kind, objective, batch_size=8, accumulation=1),
            reference_file(tmp_path, kind, objective),
        )
    worker = Path(__file__).parent / "accumulation_worker.py"
    findings = start_ranks(worker, tmp_path / "findings.json", timeout_s=240)
    assert not faults(findings, "ddp", checks=2 * len(CASES))
    for engine in ("zero2", "zero3", "fsdp2"):
        assert not faults(findings, engine, checks=1)


@pytest.mark.unit
def test_steps_take_micro_batches_in_turn_and_the_last_of_an_epoch_what_is_left():
    steps = step_batches([{"labels": torch.tensor([number])} for number in range(5)], 2)  # type: ignore[arg-type]
    found = [
        (epoch, read, [b.inputs["labels"].item() for b in step]) for epoch, read, step in islice(steps, 4)
    ]
    assert found == [(0, 2, [0, 1]), (0, 4, [2, 3]), (0, 5, [4]), (1, 2, [0, 1])]


@pytest.mark.unit
@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 4), (2, 1), (2, 4), (3, 2), (5, 3)])
def test_every_row_counts_once_an_epoch_and_every_rank_has_as_many_micro_batches(ranks, batch_size):
    for rows in range(1, 26):
        seen, lengths = [], set()
        for rank in range(ranks):
            dataset = [{"labels": torch.tensor(row)} for row in range(rows)]
            loader = prepare_data_loader(
                DataLoader(dataset, batch_size=batch_size),  # type: ignore[arg-type]
                num_processes=ranks,
                process_index=rank,
                put_on_device=False,
            )
            epoch, read, step = next(step_batches(loader, len(loader)))
            assert (epoch, read) == (0, len(loader))
            for batch in step:
                labels = batch.inputs["labels"].tolist()
                assert 0 < len(labels) <= batch_size
                assert batch.count in (0, len(labels))
                seen += labels if batch.count else []
            lengths.add(len(step))
        assert sorted(seen) == list(range(rows))
        assert len(lengths) == 1


@pytest.mark.unit
def test_a_pass_that_is_taken_up_in_its_middle_has_the_rest_of_its_rows_once():
    seen = []
    for rank in range(2):
        loader = prepare_data_loader(
            DataLoader([{"labels": torch.tensor(row)} for row in range(11)], batch_size=2),  # type: ignore[arg-type]
            num_processes=2,
            process_index=rank,
            put_on_device=False,
        )
        _, read, step = next(step_batches(loader, 9, skip=1))
        assert (read, len(step)) == (3, 2)
        seen += [row for batch in step if batch.count for row in batch.inputs["labels"].tolist()]
    assert sorted(seen) == list(range(4, 11))


@pytest.mark.unit
def test_of_a_batch_only_what_has_its_rows_is_cut():
    def collate(rows):
        numbers = torch.tensor([row["number"] for row in rows])
        kept = {"scale": torch.tensor(0.5), "weights": torch.ones(3), "options": {"a": 1}}
        return {"pixels": numbers[:, None], "names": [str(row["number"]) for row in rows], **kept}

    loader = DataLoader([{"number": row} for row in range(7)], batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    loader = prepare_data_loader(loader, num_processes=2, process_index=1, put_on_device=False)
    (_, _, [batch]), (_, _, [last]) = islice(step_batches(loader, 1), 2)
    assert (batch.inputs["names"], batch.count) == (["2", "3"], 2)
    assert (last.inputs["names"], last.count) == (["6"], 1)
    assert (len(last.inputs["pixels"]), last.inputs["options"]) == (1, {"a": 1})
    assert (last.inputs["scale"], len(last.inputs["weights"])) == (0.5, 3)
    assert count_tokens(last.inputs, writes=False) == 1


@pytest.mark.unit
@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ({"input_ids": torch.ones(3, 5), "labels": torch.tensor([0, 1, -100])}, 2),
        ({"input_ids": torch.ones(3, 5), "labels": torch.tensor([[4, -100], [5, 6], [-100, -100]])}, 3),
        ({"input_ids": torch.ones(2, 5), "labels": torch.tensor([-100.0, 0.5])}, 2),  # a score like any other
        ({"input_ids": torch.ones(4, 5), "start_positions": torch.zeros(4)}, 4),
        ({"names": ["a", "b"], "scale": torch.tensor(0.5), "pixels": torch.ones(2, 5)}, 2),
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


@pytest.mark.unit
def test_a_step_in_which_no_row_counts_has_factors_of_zero():
    accelerator = SimpleNamespace(
        num_processes=2, gradient_accumulation_steps=2, reduce=lambda number, reduction: 2 * number
    )
    assert loss_factors([torch.tensor(0)] * 2, accelerator).tolist() == [0, 0]  # type: ignore[arg-type]
