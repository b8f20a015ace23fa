"""Random noise from a stream of its own, set by (seed, rank, step) and by nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Noise = Literal["uniform", "normal"]

_MASK = (1 << 64) - 1


def splitmix64(value: int) -> int:
    """One step of the SplitMix64 generator, a bijection of 64-bit integers (Steele, Lea and Flood 2014).

    Args:
        value: any integer, taken modulo 2**64.

    Returns:
        An integer in [0, 2**64).
    """
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def stream_seed(seed: int, rank: int, step: int) -> int:
    """Mix the seed of one rank's noise at one step: mix(mix(mix(seed) ^ rank) ^ step), mix = SplitMix64.

    For a given seed, two steps of one rank or two ranks at one step never share it. (torch's CPU generator
    reads the low 32 bits only, so on the CPU two streams coincide with probability 2**-32.)
    """
    return splitmix64(splitmix64(splitmix64(seed) ^ rank) ^ step)


def draw_noise(
    shape: Sequence[int],
    *,
    noise: Noise,
    sigma: float | Tensor,
    device: torch.device,
    seed: int,
    rank: int,
    step: int,
) -> Tensor:
    """Noise of one pass: uniform on (-sigma, sigma) or normal with standard deviation sigma.

    torch's global generators are neither read nor moved. Equal (seed, rank, step) give equal noise on one
    kind of device; CPU and CUDA generators differ.

    Args:
        shape: shape of the noise.
        noise: the distribution.
        sigma: half width or standard deviation, a number or a 0-dim tensor on ``device``.
        device: where the noise is drawn.
        seed: seed of the run.
        rank: rank of this process.
        step: number of the micro-step.

    Returns:
        Noise (shape), fp32, on ``device``.
    """
    generator = torch.Generator(device=device).manual_seed(stream_seed(seed, rank, step))
    drawn = torch.empty(tuple(shape), dtype=torch.float32, device=device)
    if noise == "uniform":
        drawn.uniform_(-1.0, 1.0, generator=generator)
    else:
        drawn.normal_(generator=generator)
    return drawn.mul_(sigma)
