"""Noise added to an embedding in one kernel: the same bits as ``generator.py``, generated where they are used.

The fp32 operations below are in the same order as there. The kernel is compiled without fusing a product and a sum
into one rounding, and with quotients rounded to nearest.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (Triton's language has no types: pyright takes its return values for None, and launch options for mistakes.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swaft.noise import generator
from swaft.noise.generator import Noise

COUNTERS = 256
"""Counters per program, four elements each."""
WARPS = 4

_UNIFORM_SCALE = tl.constexpr(generator.UNIFORM_SCALE)
_SMALLEST_UNIFORM = tl.constexpr(generator.SMALLEST_UNIFORM)
_SQRT_GUESS = tl.constexpr(generator.SQRT_GUESS)
_LOG2, _HALF_PI = tl.constexpr(generator.LOG2), tl.constexpr(generator.HALF_PI)
_A0, _A1, _A2, _A3 = map(tl.constexpr, generator.ATANH)
_S0, _S1, _S2, _S3 = map(tl.constexpr, generator.SIN)
_C0, _C1, _C2, _C3, _C4 = map(tl.constexpr, generator.COS)


@triton.jit
def _uniform(word):
    signed = word.to(tl.int32, bitcast=True)
    return tl.where(signed < 0, -signed - 1, signed).to(tl.float32) * _UNIFORM_SCALE


@triton.jit
def _log(x):
    bits = x.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    exponent = (bits >> 23) - 127
    large = mantissa > 1.4142135
    mantissa = tl.where(large, mantissa * 0.5, mantissa)
    exponent = tl.where(large, exponent + 1, exponent).to(tl.float32)
    s = tl.div_rn(mantissa - 1, mantissa + 1)
    s2 = s * s
    twice = s * 2
    return exponent * _LOG2 + (twice + twice * (s2 * (((s2 * _A3 + _A2) * s2 + _A1) * s2 + _A0)))


@triton.jit
def _sqrt(x):
    root = ((x.to(tl.int32, bitcast=True) >> 1) + _SQRT_GUESS).to(tl.float32, bitcast=True)
    for _ in tl.static_range(3):
        root = (root + tl.div_rn(x, root)) * 0.5
    return root


@triton.jit
def _box_muller(u1, u2):
    radius = _sqrt(_log(tl.maximum(u1, _SMALLEST_UNIFORM)) * -2.0)
    quarters = u2 * 4
    nearest = tl.floor(quarters + 0.5)
    x = (quarters - nearest) * _HALF_PI
    x2 = x * x
    sin = x + x * (x2 * (((x2 * _S3 + _S2) * x2 + _S1) * x2 + _S0))
    cos = x2 * ((((x2 * _C4 + _C3) * x2 + _C2) * x2 + _C1) * x2 + _C0) + 1
    odd = (nearest == 1) | (nearest == 3)
    across, up = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return (
        radius * tl.where((nearest == 1) | (nearest == 2), -across, across),
        radius * tl.where((nearest == 2) | (nearest == 3), -up, up),
    )


@triton.jit(do_not_specialize=["stream"])
def _noise_kernel(embedding, out, sigma, numel, stream, NORMAL: tl.constexpr, COUNTERS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * COUNTERS
    counter = place + tl.arange(0, COUNTERS)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    first, second, third, fourth = tl.philox(stream, low, high, zero, zero)
    first, second, third, fourth = _uniform(first), _uniform(second), _uniform(third), _uniform(fourth)
    if NORMAL:
        first, second = _box_muller(first, second)
        third, fourth = _box_muller(third, fourth)
    else:
        first, second, third, fourth = first * 2 - 1, second * 2 - 1, third * 2 - 1, fourth * 2 - 1
    noise = tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth)) * tl.load(sigma)

    element = place * 4 + tl.arange(0, 4 * COUNTERS)
    mask = element < numel
    wide = out.dtype.element_ty
    noised = tl.load(embedding + element, mask=mask, other=0.0).to(wide) + noise.to(wide)
    tl.store(out + element, noised, mask=mask)


def noise_into(out: Tensor, embedding: Tensor, *, noise: Noise, sigma: Tensor, stream: int) -> None:
    """Write embedding + sigma * noise; the elements of the noise are those of ``generator.standard_noise``.

    Args:
        out: result, contiguous, fp32 or float64; the sum is computed in its dtype.
        embedding: what the noise is added to, contiguous, of the same shape and any floating dtype.
        noise: the distribution.
        sigma: half width or standard deviation, 0-dim, fp32, on the device of ``out``.
        stream: seed of the stream, in [0, 2**64).
    """
    if not out.numel():
        return
    with torch.cuda.device_of(out):
        _noise_kernel[(triton.cdiv(out.numel(), 4 * COUNTERS),)](
            embedding,
            out,
            sigma,
            out.numel(),
            stream - (1 << 64) if stream >> 63 else stream,  # always an int64, so one compilation serves all
            NORMAL=noise == "normal",
            COUNTERS=COUNTERS,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
