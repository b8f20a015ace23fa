"""The arithmetic of an average, elementwise, in plain tensor operations: the reference that `native.py` must match.

A plain fp32 running mean loses accuracy as its count grows: once ``w * (x - m)`` falls below half a unit in the
last place of the mean, the update is lost. Here a running mean is the unevaluated sum of an fp32 word ``m`` and a
bf16 word ``c`` that holds what the fp32 word rounded away (Kahan 1965): 6 bytes per element. The rounding error is
computed as in Dekker 1971, which is exact while the mean is larger than its step; otherwise, what is missed is
about the size of the rounding of the step itself.

Every operation is one IEEE operation per element (no fused multiply-add, no reduction), so the bits of an element
depend only on its own history: not on the chunk, the shard, the thread count or the engine.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def update_(m: Tensor, c: Tensor, x: Tensor, w: float) -> None:
    """Move a compensated mean towards new weights, in place: ``m + c <- (m + c) + w * (x - (m + c))``.

    Args:
        m: (n,), fp32: the mean, rounded to fp32.
        c: (n,), bf16: what that rounding took away.
        x: (n,), fp32; not changed.
        w: share of the new weights, in (0, 1], rounded to fp32; 1 copies them.
    """
    if w == 1.0:
        m.copy_(x)
        c.zero_()
        return
    d = c.float()
    step = ((x - m) - d) * w + d
    total = m + step
    c.copy_(nearest_bf16(step - (total - m)))
    m.copy_(total)


def nearest_bf16(values: Tensor) -> Tensor:
    """Finite fp32 values rounded to bf16, ties away from zero (torch's own conversion rounds ties to even)."""
    return ((values.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


def update_plain_(m: Tensor, x: Tensor, w: float) -> None:
    """The same in fp32 only, 4 bytes per element: ``m <- m + w * (x - m)``."""
    if w == 1.0:
        m.copy_(x)
        return
    m.copy_(m + (x - m) * w)


def combine(lanes: Iterable[tuple[float, Tensor, Tensor | None]]) -> Tensor:
    """A linear combination of lanes, summed in float64 in the given order and rounded once to fp32.

    Args:
        lanes: (coefficient, m, c) each, one or more, taken one at a time; ``c`` is None for a lane without
            compensation.
    """
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for coefficient, m, c in lanes:
        value = m.double() if c is None else m.double() + c.double()
        total = total + value * coefficient
    return total.float()


def reference_mean(members: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """The compensated running mean of a sequence of members: (n,), fp32.

    Args:
        members: (n,), fp32 each.
        weights: share of each member as it arrives; the first is 1.
    """
    m = c = None
    for x, w in zip(members, weights, strict=False):
        if m is None or c is None:
            m, c = torch.empty_like(x), torch.empty_like(x, dtype=torch.bfloat16)
        update_(m, c, x, w)
    if m is None:
        raise ValueError("no members")
    return m
