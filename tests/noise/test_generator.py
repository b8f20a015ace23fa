from __future__ import annotations

import itertools

import pytest
import torch

from swaft.noise.generator import add_noise, splitmix64, stream_seed

pytestmark = pytest.mark.unit


def draw(*, noise="uniform", sigma=1.0, shape=(200, 100), seed=0, rank=0, step=0) -> torch.Tensor:
    return add_noise(torch.zeros(shape), noise=noise, sigma=sigma, seed=seed, rank=rank, step=step)


def test_splitmix64_matches_its_published_sequence():
    # The generator seeded with 1234567, whose n-th output is the mix of seed + (n - 1) * golden gamma.
    golden = 0x9E3779B97F4A7C15
    outputs = [splitmix64(1234567 + n * golden) for n in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("noise", ["uniform", "normal"])
def test_equal_seed_rank_and_step_repeat_the_noise_exactly(noise):
    assert torch.equal(draw(noise=noise, seed=3, rank=1, step=7), draw(noise=noise, seed=3, rank=1, step=7))


def test_streams_differ_across_seeds_ranks_and_steps():
    places = list(itertools.product(range(3), range(4), range(20)))
    assert len({stream_seed(*place) for place in places}) == len(places)
    drawn = [draw(seed=s, rank=r, step=n, shape=(64,)) for s, r, n in places]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_ranks_are_uncorrelated():
    a, b = (draw(noise="normal", rank=rank).flatten() for rank in (0, 1))
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.03


def test_uniform_noise_fills_the_interval_and_no_more():
    noise = draw(sigma=1e-5)
    assert noise.dtype == torch.float32
    assert noise.abs().max() <= 1e-5
    assert noise.abs().max() > 0.999e-5
    assert float(noise.std()) == pytest.approx(1e-5 / 3**0.5, rel=0.02)


def test_normal_noise_has_standard_deviation_sigma():
    noise = draw(noise="normal", sigma=torch.tensor(0.25))
    assert float(noise.std()) == pytest.approx(0.25, rel=0.02)
    assert abs(float(noise.mean())) < 0.01


def test_drawing_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    draw()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("noise", ["uniform", "normal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_noise_is_added_in_fp32_or_wider(noise, dtype):
    embedding = torch.randn(3, 5, 7).to(dtype)
    place = {"noise": noise, "sigma": 1e-5, "seed": 1, "rank": 2, "step": 3}
    wide = torch.promote_types(dtype, torch.float32)
    summed = add_noise(embedding, **place)
    assert summed.dtype == wide
    drawn = add_noise(torch.zeros(3, 5, 7), **place)
    assert torch.equal(summed, embedding.to(wide) + drawn.to(wide))


def test_noise_does_not_depend_on_how_the_embedding_lies_in_memory():
    embedding = torch.randn(4, 6)
    place = {"noise": "uniform", "sigma": 0.1, "seed": 1, "rank": 2, "step": 3}
    assert torch.equal(add_noise(embedding.t(), **place), add_noise(embedding.t().contiguous(), **place))


def test_a_relative_sigma_may_be_a_tensor():
    embedding = torch.randn(64)
    place = {"noise": "uniform", "seed": 1, "rank": 2, "step": 3}
    assert torch.equal(
        add_noise(embedding, sigma=torch.tensor(0.25), **place), add_noise(embedding, sigma=0.25, **place)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_gradient_passes_noise_unchanged(dtype):
    embedding = torch.randn(4, 6, dtype=dtype, requires_grad=True)
    summed = add_noise(embedding, noise="normal", sigma=0.1, seed=1, rank=2, step=3)
    upstream = torch.randn_like(summed)
    (gradient,) = torch.autograd.grad(summed, embedding, upstream)
    assert torch.equal(gradient, upstream.to(dtype))


def test_an_empty_embedding_stays_empty():
    assert add_noise(torch.empty(0, 8), noise="normal", sigma=0.1, seed=1, rank=2, step=3).shape == (0, 8)
