"""Elementary functions in Triton that keep their digits near zero, of additions, products and exp2.

CUDA's own are not used: its library cannot be called under Triton's interpreter, and its fast logarithm is exact to
2^-22 in absolute terms only, where the logarithm of a number near 1 is wanted.
"""

# pyright: reportGeneralTypeIssues=false
# (Triton's language has no types: what it returns is taken for nothing.)

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
SMALL = tl.constexpr(0.25)
"""Up to here exp(x) - 1 is a series; beyond, the subtraction costs two bits at most."""


@triton.jit
def exp(x):
    """e^x, to 2e-7 relative; 0 at -inf."""
    return tl.exp2(x * _LOG2E)


@triton.jit
def expm1_series(x):
    """exp(x) - 1 for |x| < 1/4, by its series; relative error 5e-8."""
    return x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720))))))


@triton.jit
def one_minus_exp(x, e):
    """1 - exp(-x) for x >= 0, given e = exp(-x)."""
    return tl.where(x < SMALL, -expm1_series(-x), 1 - e)


@triton.jit
def log1p(x):
    """log(1 + x) = 2 atanh(x / (2 + x)) for -1/2 <= x <= 1, by its series; relative error 1e-8."""
    s = x / (2 + x)
    s2 = s * s
    tail = 1 / 9 + s2 * (1 / 11 + s2 * (1 / 13 + s2 * (1 / 15 + s2 * (1 / 17))))
    return 2 * s * (1 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * tail))))


@triton.jit
def softcap(z, d, cap, CAPPED: tl.constexpr):
    """The soft-cap cap tanh(z / cap) of both rows: logits, clean minus noised, and the two slopes.

    With e_v = exp(-2 |v|), a = z / cap and b = (z - d) / cap, no term is a difference of rounded numbers:
    tanh a - tanh b = sinh(a - b) / (cosh a cosh b)
                    = 2 sign(a - b) exp(|a - b| - |a| - |b|) (1 - e_{a - b}) / ((1 + e_a)(1 + e_b)),
    1 - tanh(a)^2 = 4 e_a / (1 + e_a)^2.
    """
    if CAPPED:
        a, difference = z / cap, d / cap
        b = a - difference
        size_a, size_b, width = tl.abs(a), tl.abs(b), tl.abs(difference)
        e_a, e_b, e_width = exp(-2 * size_a), exp(-2 * size_b), exp(-2 * width)
        half_a, half_b = 1 / (1 + e_a), 1 / (1 + e_b)
        tanh = one_minus_exp(2 * size_a, e_a) * half_a
        gap = 2 * exp(width - size_a - size_b) * one_minus_exp(2 * width, e_width) * (half_a * half_b)
        return (
            cap * tl.where(a < 0, -tanh, tanh),
            cap * tl.where(difference < 0, -gap, gap),
            4 * e_a * (half_a * half_a),
            4 * e_b * (half_b * half_b),
        )
    else:
        return z, d, 1.0, 1.0
