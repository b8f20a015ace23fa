"""The order of training rows."""

from __future__ import annotations

import numpy as np
import pytest

from swaft.training.data.loaders import length_grouped, shuffled

pytestmark = pytest.mark.unit

LENGTHS = np.random.default_rng(3).integers(5, 200, size=90).tolist()


def padded_tokens(lengths: list[int], order: list[int], batch_size: int) -> int:
    batches = [[lengths[row] for row in order[i : i + batch_size]] for i in range(0, len(order), batch_size)]
    return sum(max(batch) * len(batch) for batch in batches)


def test_grouped_batches_hold_little_padding_and_every_row_once():
    lengths = np.random.default_rng(0).integers(5, 200, size=400).tolist()
    sampler = length_grouped(lengths, batch_size=8, seed=1)
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(range(400))
    assert first != second
    assert lengths[first[0]] == max(lengths)
    shuffled = np.random.default_rng(0).permutation(400).tolist()
    assert padded_tokens(lengths, first, 8) < 1.15 * sum(lengths) < padded_tokens(lengths, shuffled, 8)


def test_order_comes_again_with_the_seed():
    lengths = list(range(50))
    orders = [list(length_grouped(lengths, batch_size=4, seed=seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    "make",
    [lambda seed: shuffled(90, seed=seed), lambda seed: length_grouped(LENGTHS, batch_size=4, seed=seed)],
    ids=["shuffled", "length-grouped"],
)
def test_a_pass_has_its_order_whatever_came_before(make):
    one, other = make(7), make(7)
    passes = [list(one) for _ in range(4)]
    other.set_epoch(2)
    assert [list(other), list(other)] == passes[2:]
    assert all(sorted(each) == list(range(90)) for each in passes)
    assert len({tuple(each) for each in passes}) == 4
    assert list(make(8)) not in passes  # no pass of a neighbouring seed either
    assert len(one) == 90
