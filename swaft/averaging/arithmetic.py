"""The running mean of weights, elementwise, kept in an fp32 word and a bf16 compensation word.

A plain fp32 running mean rots as its count grows: once ``w_n * (weights - mean)`` falls below half a unit in
the last place of the mean, the update is lost. Here the mean is the unevaluated sum of an fp32 word and a bf16
word that holds what the fp32 word rounded away (the idea of Kahan 1965), 6 bytes an element, and the step
between the two is taken in fp64.

Every operation is one IEEE operation an element (no fused multiply-add, no reduction), so the bits of an
element depend on its own history alone: not on the chunk, the shard, the thread count or the engine.
"""

from __future__ import annotations

import torch
from torch import Tensor


def update_mean_(
    mean: Tensor, compensation: Tensor, weights: Tensor, weight: float, *, scratch: tuple[Tensor, Tensor]
) -> None:
    """Move a compensated mean towards new weights, in place: ``m <- m + weight * (weights - m)``.

    ``m = mean + compensation`` in fp64; afterwards ``mean = fp32(m)`` and ``compensation = bf16(m - mean)``.

    Args:
        mean: (n,), fp32, host.
        compensation: (n,), bf16, host.
        weights: (n,), fp32, host; not changed.
        weight: share of the new weights, in (0, 1]; 1 copies them.
        scratch: two (at least n,) fp64 host buffers, overwritten.
    """
    if weight == 1.0:
        mean.copy_(weights)
        compensation.zero_()
        return
    exact, step = (buffer[: mean.numel()] for buffer in scratch)
    exact.copy_(mean).add_(compensation)
    torch.sub(weights, exact, out=step)
    exact.add_(step.mul_(weight))
    mean.copy_(exact)
    compensation.copy_(exact.sub_(mean))


def make_scratch(numel: int) -> tuple[Tensor, Tensor]:
    """Buffers for :func:`update_mean_` on up to ``numel`` elements."""
    return torch.empty(numel, dtype=torch.float64), torch.empty(numel, dtype=torch.float64)
