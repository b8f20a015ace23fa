"""Random noise from a stream of its own, set by (seed, rank, step) and by nothing else."""

from __future__ import annotations

import importlib.util
from typing import Any, get_args

import torch
from torch import Tensor

from swaft.errors import ConfigError
from swaft.noise.philox import Noise, standard_noise

_MASK = (1 << 64) - 1
_HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether a GPU has the one kernel; without it the same bits come from a few dozen."""


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

    For a given seed, two steps of one rank or two ranks at one step never share it.
    """
    return splitmix64(splitmix64(splitmix64(seed) ^ rank) ^ step)


def add_noise(
    embedding: Tensor, *, noise: Noise, sigma: float | Tensor, seed: int, rank: int, step: int
) -> Tensor:
    """Add noise, uniform on [-sigma, sigma) or normal with standard deviation sigma, in fp32.

    The noise is a function of (seed, rank, step) and of each element's index alone, bit for bit the same on every
    kind of device (``philox.py``). torch's global generators are neither read nor moved.

    Args:
        embedding: any shape and floating dtype; the gradient of the result passes to it unchanged.
        noise: the distribution.
        sigma: half width or standard deviation, a number or a 0-dim tensor on the embedding's device; constant.
        seed: seed of the run.
        rank: rank of this process.
        step: number of the micro-step.

    Returns:
        The sum, same shape, fp32, or float64 for a float64 embedding.

    Raises:
        ConfigError: for an unknown distribution, or tensors that do not fit.
    """
    if not embedding.is_floating_point():
        raise ConfigError(f"embedding is {embedding.dtype}; expected a floating dtype.")
    stream = stream_seed(seed, rank, step)
    return _AddNoise.apply(embedding, noise, sigma, stream)  # type: ignore[no-any-return]


class _AddNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embedding: Tensor, noise: Noise, sigma: float | Tensor, stream: int) -> Tensor:
        ctx.dtype = embedding.dtype
        dtype = torch.promote_types(embedding.dtype, torch.float32)
        out = torch.empty(embedding.shape, dtype=dtype, device=embedding.device)
        return _write(out, embedding.contiguous(), noise, sigma, stream)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_outputs[0].to(ctx.dtype), None, None, None


@torch.no_grad()
def _write(out: Tensor, embedding: Tensor, noise: Noise, sigma: float | Tensor, stream: int) -> Tensor:
    """Fill ``out`` with embedding + noise."""
    if noise not in get_args(Noise):
        raise ConfigError(f"noise is {noise!r}; expected one of {', '.join(get_args(Noise))}.")
    if isinstance(sigma, Tensor) and (sigma.dim() != 0 or sigma.device != out.device):
        raise ConfigError(
            f"sigma has shape {tuple(sigma.shape)} and is on {sigma.device}; expected a number, or a 0-dim "
            f"tensor on {out.device}."
        )
    if not isinstance(sigma, Tensor):
        sigma = torch.full((), sigma, dtype=torch.float32, device=out.device)
    sigma = sigma.float()
    if out.is_cuda and _HAS_TRITON:
        from swaft.noise.philox_triton import noise_into

        noise_into(out, embedding, noise=noise, sigma=sigma, stream=stream)
        return out
    drawn = standard_noise(out.numel(), noise=noise, stream=stream, device=out.device).view(out.shape)
    drawn.mul_(sigma)
    return torch.add(embedding, drawn, out=out)
