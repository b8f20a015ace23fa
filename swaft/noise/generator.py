"""Random noise from a separate stream, determined by (seed, rank, step) only: the same bits on every device.

Philox 4x32-10 (Salmon, Moraes, Dror and Shaw 2011) maps a counter and a key to four random 32-bit words, so the
noise of every element follows from its index. Element e of a stream takes word e % 4 of counter e // 4; the key is
the stream's seed. ``philox_triton.py`` does the same on a GPU, bit for bit: everything here is integer arithmetic,
or correctly rounded fp32 operations in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from swaft.environment import has_triton
from swaft.noise.loss.options import wide_dtype

Noise = Literal["uniform", "normal"]

_WORD, _MASK = (1 << 32) - 1, (1 << 64) - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

UNIFORM_SCALE = 4.6566127342e-10
"""Slightly below 2**-31, so that a 31-bit integer times it stays below 1 in fp32."""
SMALLEST_UNIFORM = 1e-7
"""Lower bound of a uniform number before its logarithm is taken."""

SQRT_GUESS = 0x1FBD1DF5
"""Half the exponent bias of an fp32 number, as bits; the low bits balance the error of the guess."""
LOG2, HALF_PI = 0.6931471805599453, 1.5707963267948966
ATANH = (1 / 3, 1 / 5, 1 / 7, 1 / 9)
"""Coefficients of atanh(s) / s - 1 in s^2, starting at s^2."""
SIN = (-1 / 6, 1 / 120, -1 / 5040, 1 / 362880)
"""Coefficients of sin(x) / x - 1 in x^2."""
COS = (-1 / 2, 1 / 24, -1 / 720, 1 / 40320, -1 / 3628800)
"""Coefficients of cos(x) - 1 in x^2."""

_BLOCK = 1 << 15
"""Counters per block: their words and products stay in a core's cache."""


def splitmix64(value: int) -> int:
    """One step of the SplitMix64 generator, a bijection of 64-bit integers (Steele, Lea and Flood 2014).

    Args:
        value: any integer, taken modulo 2**64.

    Returns:
        An integer in [0, 2**64).
    """
    value = (int(value) + 0x9E3779B97F4A7C15) & _MASK  # numpy's integers would overflow
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def stream_seed(seed: int, rank: int, step: int) -> int:
    """Mix the seed of one rank's noise at one step: mix(mix(mix(seed) ^ rank) ^ step), mix = SplitMix64.

    For a given seed, two steps of one rank, or two ranks at one step, never share it.
    """
    return splitmix64(splitmix64(splitmix64(seed) ^ rank) ^ step)


def add_noise(
    embedding: Tensor, *, noise: Noise, sigma: float | Tensor, seed: int, rank: int, step: int
) -> Tensor:
    """Add noise, uniform on [-sigma, sigma) or normal with standard deviation sigma, in fp32.

    The noise depends only on (seed, rank, step) and on each element's index, and is bit for bit the same on every
    kind of device. torch's global generators are neither read nor advanced.

    Args:
        embedding: any shape and floating dtype; the gradient of the result passes to it unchanged.
        noise: the distribution.
        sigma: half width or standard deviation; a number or a 0-dim tensor on the embedding's device, without
            gradient.
        seed: seed of the run.
        rank: rank of this process.
        step: number of the micro-step.

    Returns:
        The sum, same shape, fp32, or float64 for a float64 embedding.
    """
    stream = stream_seed(seed, rank, step)
    return _AddNoise.apply(embedding, noise, sigma, stream)  # type: ignore[no-any-return]


class _AddNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embedding: Tensor, noise: Noise, sigma: float | Tensor, stream: int) -> Tensor:
        ctx.dtype = embedding.dtype
        embedding = embedding.contiguous()
        out = torch.empty(embedding.shape, dtype=wide_dtype(embedding), device=embedding.device)
        if not isinstance(sigma, Tensor):
            sigma = torch.full((), sigma, dtype=torch.float32, device=out.device)
        sigma = sigma.float()
        if out.is_cuda and has_triton():
            from swaft.noise.philox_triton import noise_into

            noise_into(out, embedding, noise=noise, sigma=sigma, stream=stream)
            return out
        drawn = standard_noise(out.numel(), noise=noise, stream=stream, device=out.device).view(out.shape)
        return torch.add(embedding, drawn.mul_(sigma), out=out)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_outputs[0].to(ctx.dtype), None, None, None


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox 4x32.

    Args:
        counter: four words, each (n,), int64 in [0, 2**32), lowest first.
        key: two words, lowest first.

    Returns:
        Four random words, each (n,), int64 in [0, 2**32).
    """
    a, b, c, d = counter
    low_key, high_key = key
    for _ in range(_ROUNDS):
        product_a, product_c = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]  # modulo 2**64
        a = _high(product_c).bitwise_xor_(b).bitwise_xor_(low_key)
        c = _high(product_a).bitwise_xor_(d).bitwise_xor_(high_key)
        b, d = product_c.bitwise_and_(_WORD), product_a.bitwise_and_(_WORD)
        low_key, high_key = (low_key + _KEY_STEPS[0]) & _WORD, (high_key + _KEY_STEPS[1]) & _WORD
    return a, b, c, d


def standard_noise(numel: int, *, noise: Noise, stream: int, device: torch.device | str = "cpu") -> Tensor:
    """The first elements of a stream: uniform on [-1, 1) or standard normal.

    Args:
        numel: how many elements.
        noise: the distribution.
        stream: seed of the stream, in [0, 2**64).
        device: where to compute.

    Returns:
        The noise (numel,), fp32.
    """
    out = torch.empty((-(-numel // 4), 4), dtype=torch.float32, device=device)
    for begin in range(0, len(out), _BLOCK):
        block = out[begin : begin + _BLOCK]
        words = _words(begin, len(block), stream, out.device)
        if noise == "uniform":
            torch.stack([uniform(word).mul_(2).sub_(1) for word in words], dim=1, out=block)
        else:
            pairs = (words[:2], words[2:])
            torch.stack(
                [normal for pair in pairs for normal in box_muller(*map(uniform, pair))], 1, out=block
            )
    return out.view(-1)[:numel]


def _words(
    first: int, count: int, stream: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words of counters ``first`` to ``first + count``: 64-bit counters, whose upper two words are 0."""
    index = torch.arange(first, first + count, device=device)
    zero = torch.zeros_like(index)
    return philox((index & _WORD, index >> 32, zero, zero), (stream & _WORD, stream >> 32))


def _high(product: Tensor) -> Tensor:
    """Upper word of a 64-bit product, treated as unsigned."""
    return (product >> 32).bitwise_and_(_WORD)


def uniform(word: Tensor) -> Tensor:
    """Map a word to [0, 1), fp32, like ``triton.language.rand``: words above 2**31 are mirrored."""
    return torch.minimum(word, _WORD - word).float().mul_(UNIFORM_SCALE)


def box_muller(u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normal numbers from two uniform ones (Box and Muller 1958).

    sqrt(-2 log u1) times (cos, sin) of 2 pi u2. Libraries differ in the last bit of log, sin, cos and even sqrt
    (torch's own on a CPU, where MKL computes it), so these are built from sums, products and quotients, which do
    not differ.
    """
    radius = _sqrt(_log(u1.clamp(min=SMALLEST_UNIFORM)) * -2.0)
    quarters = u2 * 4
    nearest = torch.floor(quarters + 0.5)
    x = (quarters - nearest) * HALF_PI  # in [-pi/4, pi/4]
    x2 = x * x
    sin = x + x * (x2 * _polynomial(SIN, x2))
    cos = x2 * _polynomial(COS, x2) + 1
    odd = (nearest == 1) | (nearest == 3)
    across, up = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    return (
        radius * torch.where((nearest == 1) | (nearest == 2), -across, across),
        radius * torch.where((nearest == 2) | (nearest == 3), -up, up),
    )


def _log(x: Tensor) -> Tensor:
    """log(2^e m) = e log 2 + 2 atanh((m - 1) / (m + 1)), m in (0.7, 1.42), for normal fp32 numbers."""
    bits = x.view(torch.int32)
    mantissa = ((bits & 0x007FFFFF) | 0x3F800000).view(torch.float32)
    exponent = (bits >> 23) - 127
    large = mantissa > 1.4142135
    mantissa = torch.where(large, mantissa * 0.5, mantissa)
    exponent = torch.where(large, exponent + 1, exponent).float()
    s = (mantissa - 1) / (mantissa + 1)
    s2 = s * s
    twice = s * 2
    return exponent * LOG2 + (twice + twice * (s2 * _polynomial(ATANH, s2)))


def _sqrt(x: Tensor) -> Tensor:
    """Square root of positive fp32 numbers: half the exponent, then Heron's steps; errors 4 %, 6e-4, 2e-7, 0."""
    root = ((x.view(torch.int32) >> 1) + SQRT_GUESS).view(torch.float32)
    for _ in range(3):
        root = (root + x / root) * 0.5
    return root


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """c0 + x (c1 + x (c2 + ...)), each product and each sum rounded."""
    total = x * coefficients[-1] + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        total = total * x + coefficient
    return total
