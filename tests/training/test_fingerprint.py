"""Digests of what a run must find again: weights that are not trained, and rows."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch import nn

from swaft.training.run.record import (
    SAMPLED_ROWS,
    fingerprint_architecture,
    fingerprint_frozen,
    fingerprint_rows,
)

pytestmark = pytest.mark.unit


def model(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    return layers.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bit_of_a_frozen_weight_is_another_digest(dtype):
    one, other = model(dtype), model(dtype)
    assert fingerprint_frozen(one) == fingerprint_frozen(other)
    words = other[1].weight.view(torch.int32 if dtype is torch.float32 else torch.int16)
    words[1, 2] ^= 1
    assert fingerprint_frozen(one) != fingerprint_frozen(other)


def test_weights_that_are_trained_and_names_do_and_do_not_count():
    one, other = model(), model()
    other[0].weight.requires_grad_()
    assert fingerprint_frozen(one) != fingerprint_frozen(other)
    one[0].weight.requires_grad_()
    nn.init.ones_(one[0].weight)
    assert fingerprint_frozen(one) == fingerprint_frozen(other)
    assert fingerprint_frozen(nn.Sequential(*reversed(list(model())))) != fingerprint_frozen(model())


def test_shapes_and_what_is_trained_are_the_architecture_and_values_are_not():
    known = fingerprint_architecture(model())
    other = model()
    nn.init.ones_(other[0].weight)
    assert fingerprint_architecture(other) == known
    other[0].weight.requires_grad_()
    assert fingerprint_architecture(other) != known
    assert fingerprint_architecture(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))) != known


def rows(**changed: int) -> Dataset:
    ids = [[number, number + 1] for number in range(200)]
    for where, value in changed.items():
        ids[int(where[1:])][0] = value
    return Dataset.from_dict({"input_ids": ids})


def test_rows_are_known_by_a_sample_that_holds_the_first_and_the_last():
    assert fingerprint_rows(rows()) == fingerprint_rows(rows().with_format("torch"))
    assert fingerprint_rows(rows()) != fingerprint_rows(rows(_0=9))
    assert fingerprint_rows(rows()) != fingerprint_rows(rows(_199=9))
    assert fingerprint_rows(rows()) != fingerprint_rows(rows().rename_column("input_ids", "ids"))
    assert fingerprint_rows(rows()) != fingerprint_rows(rows().shuffle(seed=0))


@pytest.mark.parametrize("number", [1, 2, SAMPLED_ROWS - 1, SAMPLED_ROWS, SAMPLED_ROWS + 1])
def test_few_rows_all_count(number):
    few = rows().select(range(number))
    different = [
        fingerprint_rows(rows(**{f"_{i}": 999}).select(range(number))) != fingerprint_rows(few)
        for i in range(number)
    ]
    assert sum(different) == min(number, SAMPLED_ROWS)
