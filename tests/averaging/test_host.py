from __future__ import annotations

import pytest
import torch

from swaft.averaging.host import HostAverage
from swaft.averaging.layout import Fragment, merge

pytestmark = pytest.mark.unit


def test_only_the_spans_are_averaged_whatever_lies_between_them():
    fragments = [Fragment("a", 0, 3, 0, 0), Fragment("b", 0, 2, 0, 5), Fragment("c", 0, 2, 1, 1)]
    average = HostAverage(merge(fragments), chunk_numel=2)
    for value in (1.0, 2.0, 6.0):
        buffers = [torch.full((8,), value), torch.full((3,), 10 * value)]
        buffers[0][3:5] = torch.nan  # padding
        average.add(buffers, 1.0 / (average.count + 1))
        assert average.is_finite(buffers)
    assert average.mean.tolist() == [3.0] * 5 + [30.0] * 2
    assert average.count == 3


def test_chunking_does_not_change_a_bit():
    fragments = [Fragment(str(i), 0, 37, i, 0) for i in range(5)]
    averages = [HostAverage(merge(fragments), chunk_numel=size) for size in (1, 10, 64, 1 << 18)]
    for n in range(20):
        buffers = [torch.randn(37) for _ in range(5)]
        for average in averages:
            average.add(buffers, 1.0 / (n + 1))
    assert all(torch.equal(a.mean, averages[0].mean) for a in averages)
    assert all(torch.equal(a.compensation, averages[0].compensation) for a in averages)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_element_that_is_not_finite_is_seen(bad):
    average = HostAverage(merge([Fragment("a", 0, 100, 0, 0)]), chunk_numel=7)
    buffers = [torch.ones(100)]
    assert average.is_finite(buffers)
    buffers[0][63] = bad
    assert not average.is_finite(buffers)


def test_a_rank_that_owns_nothing_averages_nothing():
    average = HostAverage([])
    average.add([torch.ones(3)], 1.0)
    assert average.is_finite([torch.full((3,), torch.nan)])
    assert average.squared_distance([torch.ones(3)]) == 0.0


def test_memory_is_six_bytes_an_element():
    average = HostAverage(merge([Fragment("a", 0, 1 << 20, 0, 0)]))
    held = average.mean.nbytes + average.compensation.nbytes
    assert held == 6 * (1 << 20)
