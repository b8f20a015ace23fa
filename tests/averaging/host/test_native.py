"""Compiled loops against the same arithmetic in tensor operations, bit for bit, and both against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swaft.averaging import arithmetic, native
from swaft.averaging.host.lanes import bits

pytestmark = pytest.mark.unit


def table(*runs: tuple[np.ndarray, int]):
    """The table of sources that lie apart in memory, each with its first element in the lane."""
    return (
        np.array([source.ctypes.data for source, _ in runs], np.int64),
        np.array([offset for _, offset in runs], np.int64),
        np.array([source.size for source, _ in runs], np.int64),
    )


def some_weights(generator: torch.Generator, numel: int) -> torch.Tensor:
    """fp32 of every size: of weights, tiny, huge, zero."""
    scale = 10.0 ** torch.randint(-30, 20, (numel,), generator=generator)
    values = torch.randn(numel, generator=generator) * scale.float()
    return torch.where(torch.rand(numel, generator=generator) < 0.1, 0.0, values)


shares = st.just(1.0) | st.floats(1e-7, 0.999)


@settings(deadline=None, max_examples=40)
@given(numel=st.integers(1, 70), seed=st.integers(0, 2**31), w=shares)
def test_the_compiled_update_has_the_bits_of_the_reference(numel, seed, w):
    generator = torch.Generator().manual_seed(seed)
    m, x = some_weights(generator, numel), some_weights(generator, numel)
    c = (m * 1e-8 * torch.randn(numel, generator=generator)).bfloat16()
    expected_m, expected_c = m.clone(), c.clone()
    arithmetic.update_(expected_m, expected_c, x, w)
    native.update(*table((x.numpy(), 0)), m.numpy(), bits(c), w)
    assert torch.equal(m.view(torch.int32), expected_m.view(torch.int32))
    assert torch.equal(c.view(torch.int16), expected_c.view(torch.int16))


@settings(deadline=None, max_examples=20)
@given(numel=st.integers(1, 70), seed=st.integers(0, 2**31), w=shares)
def test_the_compiled_plain_update_has_the_bits_of_the_reference(numel, seed, w):
    generator = torch.Generator().manual_seed(seed)
    m, x = some_weights(generator, numel), some_weights(generator, numel)
    expected = m.clone()
    arithmetic.update_plain_(expected, x, w)
    native.update(*table((x.numpy(), 0)), m.numpy(), bits(None), w)
    assert torch.equal(m.view(torch.int32), expected.view(torch.int32))


@settings(deadline=None, max_examples=20)
@given(numel=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_the_compiled_combination_has_the_bits_of_the_reference(numel, seed):
    generator = torch.Generator().manual_seed(seed)
    lanes = [(0.3, torch.randn(numel, generator=generator), None)]
    lanes.append((0.7, torch.randn(numel, generator=generator), torch.randn(numel).bfloat16() * 1e-8))
    total = np.zeros(numel)
    native.accumulate(total, 0.3, lanes[0][1].numpy(), bits(None))
    native.accumulate(total, 0.7, lanes[1][1].numpy(), bits(lanes[1][2]))
    expected = arithmetic.combine(lanes)
    assert torch.equal(torch.from_numpy(total).float().view(torch.int32), expected.view(torch.int32))


def test_sources_that_lie_apart_are_taken_from_their_own_places():
    first, second = np.full(3, 2.0, np.float32), np.full(2, 4.0, np.float32)
    m = np.zeros(7, np.float32)
    native.update(*table((first, 4), (second, 1)), m, bits(None), 0.5)
    assert m.tolist() == [0, 2, 2, 0, 1, 1, 1]
    words = np.arange(1, 8, dtype=np.uint16)
    native.update(*table((second, 5)), m, words, 1.0)
    assert m.tolist() == [0, 2, 2, 0, 1, 4, 4]
    assert words.tolist() == [1, 2, 3, 4, 5, 0, 0]


def test_a_weight_that_only_rounds_to_one_is_no_copy():
    x, m, c = np.float32([1e-4]), np.float32([1.0]), np.uint16([0])
    native.update(*table((x, 0)), m, c, 1 - 1e-12)
    expected = torch.tensor([1.0]), torch.tensor([0.0]).bfloat16()
    arithmetic.update_(*expected, torch.from_numpy(x), 1 - 1e-12)
    assert m.tolist() == expected[0].tolist() != x.tolist()
    assert c.tolist() == bits(expected[1]).tolist()


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_kept_of_a_rounding_is_itself_rounded_away_from_zero_at_a_tie(sign):
    halfway = (1 + 2.0**-8) / 2
    # Next to each other, so the mean stays where it is and all of the step is kept beside it.
    x, m, c = np.float32([sign * (2**24 + 2)]), np.float32([sign * 2**24]), np.uint16([0])
    expected = torch.from_numpy(m.copy()), torch.tensor([0.0]).bfloat16()
    arithmetic.update_(*expected, torch.from_numpy(x), halfway / 2)
    native.update(*table((x, 0)), m, c, halfway / 2)
    assert expected[0].tolist() == m.tolist() == [sign * 2**24]
    assert expected[1].tolist() == [sign * (1 + 2.0**-7) / 2]
    assert c.tolist() == bits(expected[1]).tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 9e37])
@pytest.mark.parametrize("place", [0, 8, 36])
def test_one_element_that_is_not_finite_is_seen(bad, place):
    x = np.full(37, 8e37, np.float32)
    assert native.all_finite(*table((x, 0)))
    x[place] = bad
    assert not native.all_finite(*table((np.ones(5, np.float32), 0), (x, 5)))
