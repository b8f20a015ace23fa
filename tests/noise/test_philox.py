from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from swaft.noise.generator import _words, box_muller, philox, standard_noise, uniform

pytestmark = pytest.mark.unit

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "digits of pi"],
)
def test_the_words_are_those_its_authors_published(counter, key, expected):
    words = philox([torch.tensor([word]) for word in counter], key)
    assert [int(word) for word in words] == list(expected)


def test_an_element_does_not_depend_on_how_many_are_drawn():
    whole = standard_noise(400_000, noise="normal", stream=7)
    assert torch.equal(standard_noise(200_003, noise="normal", stream=7), whole[:200_003])
    assert torch.equal(standard_noise(3, noise="normal", stream=7), whole[:3])


def test_words_past_the_low_word_of_the_counter_do_not_repeat():
    begun, across, beyond = (
        torch.stack(_words(first, count, 7, torch.device("cpu")))
        for first, count in ((0, 8), ((1 << 32) - 8, 16), (1 << 32, 8))
    )
    assert torch.equal(across[:, 8:], beyond)
    assert not torch.equal(beyond, begun)


def test_both_halves_of_the_seed_count():
    drawn = [standard_noise(64, noise="uniform", stream=stream) for stream in (1, 1 << 32, 1 << 63, 0)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_a_word_becomes_a_number_below_one():
    ends = uniform(torch.tensor([0, (1 << 31) - 1, 1 << 31, ONES]))
    assert ends.tolist() == pytest.approx([0.0, 1.0, 1.0, 0.0], abs=1e-7)
    assert bool((ends < 1).all())


def test_uniform_noise_is_uniform():
    noise = standard_noise(1_000_000, noise="uniform", stream=20).double()
    assert stats.kstest(noise.numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert float(noise.min()) >= -1
    assert float(noise.max()) < 1


def test_normal_noise_is_normal():
    noise = standard_noise(1_000_000, noise="normal", stream=21).double()
    assert stats.kstest(noise.numpy(), stats.norm.cdf).pvalue > 1e-3
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0), (6, 15.0)):
        deviation = math.sqrt(math.prod(range(1, 2 * power, 2)) / len(noise))  # at most that of the mean
        assert float((noise**power).mean()) == pytest.approx(moment, abs=4 * deviation)


@pytest.mark.parametrize("noise", ["uniform", "normal"])
def test_neighbours_in_a_counter_and_beyond_are_uncorrelated(noise):
    drawn = standard_noise(400_000, noise=noise, stream=22).double()
    drawn = (drawn - drawn.mean()) / drawn.std()
    for lag in (1, 2, 3, 4, 8):
        assert abs(float((drawn[lag:] * drawn[:-lag]).mean())) < 4 / math.sqrt(len(drawn))
        squares = drawn.square() - 1
        assert abs(float((squares[lag:] * squares[:-lag]).mean())) < 4 * 2 / math.sqrt(len(drawn))


def test_box_muller_is_right_to_the_last_bits():
    u1 = torch.linspace(0, 1, 100_003)[1:-1]
    u2 = torch.linspace(0, 1, 99_991)[:-1].repeat(2)[: len(u1)]
    radius = torch.sqrt(-2 * torch.log(u1.double()))
    angle = 2 * math.pi * u2.double()
    across, up = box_muller(u1, u2)
    torch.testing.assert_close(across.double(), radius * torch.cos(angle), rtol=0, atol=1.5e-6)
    torch.testing.assert_close(up.double(), radius * torch.sin(angle), rtol=0, atol=1.5e-6)


def test_the_ends_of_the_uniform_numbers_give_finite_normal_ones():
    ends = torch.tensor([0.0, 1e-7, 0.25, 0.5, 0.75, 1 - 2**-24])
    pairs = torch.cartesian_prod(ends, ends)
    across, up = box_muller(pairs[:, 0].contiguous(), pairs[:, 1].contiguous())
    assert bool(torch.isfinite(across).all())
    assert bool(torch.isfinite(up).all())
    assert torch.hypot(across, up).max() < 5.7  # sqrt(-2 log 1e-7)
