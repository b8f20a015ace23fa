from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaft.averaging.layout import (
    Fragment,
    check_coverage,
    cut,
    merge,
    numel_of,
    section,
    slice_of,
)
from swaft.errors import LayoutError

pytestmark = pytest.mark.unit

numels = st.lists(st.integers(1, 30), min_size=1, max_size=8)


def wholes(numels):
    return [Fragment(f"p{i}", 0, numel, i, 0) for i, numel in enumerate(numels)]


@given(numels=numels, world_size=st.integers(1, 9))
def test_slices_of_replicated_weights_cover_every_element_once(numels, world_size):
    by_rank = [slice_of(wholes(numels), r, world_size) for r in range(world_size)]
    check_coverage(by_rank[::-1], {f"p{i}": numel for i, numel in enumerate(numels)})
    assert all(f.offset == f.start for fragments in by_rank for f in fragments), "where it lies in its buffer"
    shares = [sum(f.numel for f in fragments) for fragments in by_rank]
    assert max(shares) - min(shares) <= 1


@given(numels=numels, shards=st.integers(1, 4), replicas=st.integers(1, 4))
def test_slices_of_shards_cover_every_element_once(numels, shards, replicas):
    """As under HSDP: every shard is held by several ranks, which share it out."""
    held = [slice_of(wholes(numels), shard, shards) for shard in range(shards)]
    by_rank = [slice_of(each, replica, replicas) for each in held for replica in range(replicas)]
    check_coverage(by_rank, {f"p{i}": numel for i, numel in enumerate(numels)})


@given(numels=numels, max_numel=st.integers(1, 40), padding=st.integers(0, 2))
def test_merging_and_cutting_keep_every_element_in_order(numels, max_numel, padding):
    fragments, offset = [], 0
    for i, numel in enumerate(numels):
        fragments.append(Fragment(f"p{i}", 0, numel, 0, offset))
        offset += numel + padding
    expected = [f.offset + e for f in fragments for e in range(f.numel)]
    spans = merge(fragments)
    assert [s.offset + e for s in spans for e in range(s.numel)] == expected
    assert len(spans) == (1 if padding == 0 else len(numels))
    chunks = cut(spans, max_numel)
    assert [s.offset + e for c in chunks for s in c for e in range(s.numel)] == expected
    assert all(numel_of(chunk) == max_numel for chunk in chunks[:-1])
    assert [c[0].shard_offset for c in chunks] == list(range(0, sum(numels), max_numel))


def test_neighbours_are_those_of_one_buffer():
    spans = merge([Fragment("a", 0, 3, 0, 0), Fragment("b", 0, 2, 1, 3)])
    assert [(span.buffer, span.offset, span.numel) for span in spans] == [(0, 0, 3), (1, 3, 2)]


def test_a_position_in_the_shard_is_named_by_parameter_and_element():
    fragments = [Fragment("a", 3, 5, 0, 0), Fragment("b", 0, 4, 0, 2)]
    assert [each.range for each in section(fragments, 1, 2)] == [("a", 4, 5)]
    assert [each.range for each in section(fragments, 2, 3)] == [("b", 0, 1)]
    assert [each.range for each in section(fragments, 1, 4)] == [("a", 4, 5), ("b", 0, 2)]


@pytest.mark.parametrize(
    ("by_rank", "found"),
    [
        ([[Fragment("a", 0, 3, 0, 0)], [Fragment("a", 4, 6, 0, 0)]], "by no rank"),
        ([[Fragment("a", 0, 3, 0, 0)], [Fragment("a", 2, 6, 0, 0)]], "twice"),
        ([[Fragment("a", 0, 6, 0, 0)], [Fragment("a", 0, 6, 0, 0)]], "twice"),
        ([[Fragment("a", 0, 3, 0, 0)], []], "3 of the 6 elements"),
        ([[], []], "0 of the 6 elements"),
        ([[Fragment("a", 0, 7, 0, 0)]], "7 of the 6 elements"),
        ([[Fragment("a", 0, 6, 0, 0), Fragment("b", 0, 1, 0, 0)], []], "not trainable"),
    ],
)
def test_an_element_owned_by_none_or_by_two_is_refused_by_name(by_rank, found):
    with pytest.raises(LayoutError, match=found):
        check_coverage(by_rank, {"a": 6})
