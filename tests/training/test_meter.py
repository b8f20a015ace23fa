from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from swaft.noise.objectives import ObjectiveOutput
from swaft.training.meter import Meter, count_tokens

pytestmark = pytest.mark.unit


def output(value: float) -> ObjectiveOutput:
    number = torch.tensor(value)
    return ObjectiveOutput(number, number, number, number, number, number, None)


def test_tokens_are_those_read_and_those_to_write_without_padding():
    read = torch.tensor([[1, 1, 1], [1, 0, 0]])
    batch = {"input_ids": torch.full((2, 3), 5), "attention_mask": read}
    assert count_tokens(batch).item() == 4
    assert count_tokens(batch | {"labels": torch.tensor([1, 0])}).item() == 4  # classes are no tokens
    assert count_tokens(batch | {"labels": torch.tensor([[7, 8, -100], [9, -100, -100]])}).item() == 7


def test_means_are_over_rows_not_over_micro_batches(make_accelerator):
    meter = Meter(make_accelerator())
    batch = {"input_ids": torch.ones(2, 3), "labels": torch.tensor([1, 0])}
    meter.add(output(1.0), batch, torch.tensor(30))
    meter.add(output(5.0), batch, torch.tensor(10))
    record = meter.read()
    assert record["loss"] == record["divergence"] == 2.0
    meter.add(output(3.0), batch, torch.tensor(7))
    assert meter.read()["loss"] == 3.0  # what was read is over


def test_tokens_a_second_are_over_the_time_since_the_last_line_also_where_a_run_goes_on(make_accelerator):
    meter = Meter(make_accelerator())
    meter.restore(seconds=500.0, logged_at_s=400.0)
    meter.add(output(1.0), {"input_ids": torch.ones(20, 100)}, torch.tensor(20))
    record = meter.read()
    assert record["tokens_per_second"] == pytest.approx(2000 / 100, rel=0.05)
    assert record["seconds"] == pytest.approx(500, rel=0.01)


def test_a_micro_batch_without_a_row_that_counts_has_no_part_in_the_means(make_accelerator):
    meter = Meter(make_accelerator())
    batch = {"input_ids": torch.ones(2, 3)}
    meter.add(output(1.0), batch, torch.tensor(4))
    meter.add(output(9.0), batch, torch.tensor(0))
    assert meter.read()["loss"] == 1.0


def test_training_rows_of_like_length_come_together_in_every_recipe(make_accelerator):
    from datasets import Dataset

    from swaft.config import TrainConfig
    from swaft.training.loaders import training_loader

    lengths = [1 + 37 * row % 61 for row in range(240)]
    rows = Dataset.from_dict({"input_ids": [[1] * length for length in lengths], "idx": range(240)})

    def spread(group_by_length: bool) -> float:
        settings = TrainConfig(
            output_dir="unused", per_device_train_batch_size=4, group_by_length=group_by_length
        )
        loader = training_loader(
            rows, lambda batch: [len(row["input_ids"]) for row in batch], settings, SimpleNamespace(num_processes=1)
        )  # fmt: skip
        batches = list(loader)
        assert sorted(length for batch in batches for length in batch) == sorted(lengths)
        return sum(max(batch) - min(batch) for batch in batches) / len(batches)

    assert spread(True) < 5 < 30 < spread(False)
