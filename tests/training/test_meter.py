from __future__ import annotations

import re
import time

import pytest
import torch

from swaft.errors import TrainingError
from swaft.training.run.step import Meter, count_tokens

pytestmark = pytest.mark.unit


def add(meter: Meter, loss: float, *, rows: int, tokens: int = 6) -> None:
    meter.add(
        {"loss": torch.tensor(loss), "f1": torch.tensor(loss / 2)},
        count=torch.tensor(rows),
        tokens=torch.tensor(tokens),
    )


def test_tokens_are_those_read_and_those_to_write_without_padding():
    read = torch.tensor([[1, 1, 1], [1, 0, 0]])
    batch = {"input_ids": torch.full((2, 3), 5), "attention_mask": read}
    batch |= {"labels": torch.tensor([[7, 8, -100], [9, -100, -100]])}
    assert count_tokens(batch, writes=True).item() == 7
    assert count_tokens(batch, writes=False).item() == 4  # a decoder learns what it reads
    assert count_tokens({"input_ids": torch.zeros(1, 5)}, writes=False).item() == 5  # packed: no mask


def test_means_are_over_rows_not_over_micro_batches(make_accelerator):
    meter = Meter(make_accelerator())
    add(meter, 1.0, rows=30)
    add(meter, 5.0, rows=10)
    record = meter.read()
    assert (record["loss"], record["f1"]) == (2.0, 1.0)
    add(meter, 3.0, rows=7)
    assert meter.read()["loss"] == 3.0  # what was read is over


def test_tokens_a_second_are_over_the_time_since_the_last_line_also_in_a_resumed_run(make_accelerator):
    meter = Meter(make_accelerator())
    meter.load_state_dict({"names": ["loss", "f1"], "seconds": 500.0, "logged_at_s": 400.0})
    add(meter, 1.0, rows=20, tokens=2000)
    add(meter, 1.0, rows=0, tokens=9000)  # repeated rows
    record = meter.read()
    assert record["tokens_per_second"] == pytest.approx(2000 / 100, rel=0.05)
    assert record["seconds"] == pytest.approx(500, rel=0.01)


def test_a_micro_batch_without_a_row_that_counts_has_no_part_in_the_means(make_accelerator):
    meter = Meter(make_accelerator())
    add(meter, 1.0, rows=4)
    add(meter, 9.0, rows=0)
    assert meter.read()["loss"] == 1.0
    add(meter, 0.0, rows=0)  # a step in which nothing counts
    assert meter.read()["loss"] == 0.0


def test_a_pause_is_no_time_of_training(make_accelerator, monkeypatch):
    clock = iter([1000.0, 1010.0, 1070.0, 1075.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    meter = Meter(make_accelerator())
    with meter.paused():
        pass
    assert meter.seconds == 15


def test_a_resumed_recipe_that_logs_something_else_begins_its_sums_anew(make_accelerator):
    meter = Meter(make_accelerator())
    meter.load_state_dict({"names": ["loss"], "seconds": 5.0, "logged_at_s": 4.0})
    meter.sums += 100.0
    add(meter, 3.0, rows=2)
    assert (meter.read()["loss"], meter.names) == (3.0, ("loss", "f1"))


@pytest.mark.parametrize(
    ("values", "given"),
    [
        ({"loss": 1.0}, "{'loss': ()}"),
        ({"loss": 1.0, "f1": 1.0, "recall": 1.0}, "{'loss': (), 'f1': (), 'recall': ()}"),
        ({"loss": torch.ones(2), "f1": 1.0}, "{'loss': (2,), 'f1': ()}"),
        ({}, "{}"),
    ],
)
def test_values_that_are_not_numbers_under_the_first_names_are_refused(make_accelerator, values, given):
    meter, one = Meter(make_accelerator()), torch.tensor(1)
    add(meter, 1.0, rows=1)
    meter.add({"f1": 1.5, "loss": 3.0}, count=one, tokens=one)  # in any order
    with pytest.raises(TrainingError, match=re.escape(f"shapes {given}; expected {{'loss': (), 'f1': ()}}")):
        meter.add(values, count=one, tokens=one)
    assert meter.read()["loss"] == 2.0
    with pytest.raises(TrainingError, match=r"shapes \{'f1': \(\)\}; expected .*'loss'"):
        Meter(make_accelerator()).add({"f1": 1.0}, count=one, tokens=one)


def test_training_rows_of_like_length_come_together():
    from datasets import Dataset

    from swaft.training.config import TrainConfig
    from swaft.training.data.loaders import training_loader

    lengths = [1 + 37 * row % 61 for row in range(240)]
    rows = Dataset.from_dict({"input_ids": [[1] * length for length in lengths], "idx": range(240)})

    def loader_of(group_by_length: bool, size: int = 4, ranks: int = 1):
        settings = TrainConfig(
            output_dir="unused", per_device_train_batch_size=size, group_by_length=group_by_length
        )
        return training_loader(
            rows,
            lambda batch: [len(row["input_ids"]) for row in batch],
            settings,
            world_size=ranks,
            device=torch.device("cpu"),
        )

    def spread(group_by_length: bool) -> float:
        batches = list(loader_of(group_by_length))
        assert sorted(length for batch in batches for length in batch) == sorted(lengths)
        return sum(max(batch) - min(batch) for batch in batches) / len(batches)

    assert spread(True) < 5 < 30 < spread(False)
    # What several ranks read at a time is what one reads that takes as many rows.
    assert [*loader_of(True, size=4, ranks=2).sampler] == [*loader_of(True, size=8).sampler]
