"""Rows packed into few are those of the plain first fit, and lie in a file that all ranks of a machine read."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from datasets import Dataset

from swaft.training.data.packing import first_fit, pack

pytestmark = pytest.mark.unit


def plain_first_fit(lengths: list[int], max_length: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        place = next((place for place, left in enumerate(room) if left >= lengths[row]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(max_length)
        bins[place].append(row)
        room[place] -= lengths[row]
    return bins


@pytest.mark.parametrize("max_length", [2, 7, 64, 500])
def test_rows_are_placed_as_by_first_fit_one_by_one(max_length):
    draw = np.random.default_rng(max_length)
    for number in (1, 2, 30, 300):
        for low, high in ((1, max_length), (1, max_length // 3 + 1), (max_length // 2, max_length)):
            lengths = draw.integers(low, high + 1, number)
            order, places = first_fit(lengths, max_length)
            found = [order[places == place].tolist() for place in range(places.max() + 1)]
            assert found == plain_first_fit(lengths.tolist(), max_length)


@pytest.mark.timeout(10)
def test_a_hundred_thousand_short_rows_are_placed_at_once():
    lengths = np.random.default_rng(0).lognormal(4.5, 0.7, 100_000).astype(int).clip(4, 512)
    order, places = first_fit(lengths, 512)
    assert np.array_equal(np.sort(order), np.arange(100_000))
    assert np.bincount(places, weights=lengths[order]).max() <= 512


def test_packed_rows_lie_in_a_file_that_is_written_once(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    ids = [[1, 2], [3, 4, 5], [6], [7, 8, 9, 10]]
    rows = Dataset.from_dict(
        {"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids], "idx": [*range(4)]}
    )
    packed = pack(rows, 6)
    assert packed.to_list() == [
        {
            "input_ids": [7, 8, 9, 10, 1, 2],
            "labels": [-100, 8, 9, 10, -100, 2],
            "position_ids": [0, 1, 2, 3, 0, 1],
            "idx": 0,
        },
        {"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, -100], "position_ids": [0, 1, 2, 0], "idx": 1},
    ]
    [file] = packed.cache_files
    assert file["filename"].startswith(str(tmp_path))
    assert pack(rows, 6).cache_files == [file]
    assert pack(rows.select([3, 2, 1, 0]), 4)["input_ids"][:] == [[7, 8, 9, 10], [3, 4, 5, 6], [1, 2]]
