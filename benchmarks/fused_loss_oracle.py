"""The symmetric KL of a linear head in float64, value and gradients, a few rows at a time.

With z = h W^T and d = (h - h') W^T = z - z', p = softmax(z), q = softmax(z - d), all in float64:

    delta = d - Delta,  Delta = log S - log S' = c - log1p(E_p[expm1(-(d - c))]),  c = d at the most probable class
    P = p - q = -p expm1(-delta),  K = E_p[delta],  K' = -E_q[delta]
    J = sum P delta
    g  = dJ/dz  = p (delta - K) + P,    g' = dJ/dz' = -(q (delta + K') + P),    g + g' = delta P - K p - K' q
    dh = g W,   dh' = g' W,   dW = g^T h + g'^T h' = (g + g')^T h - g'^T (h - h')

d comes from a separate product and dW from the split sum, so small differences lose few digits: against
80-digit arithmetic everything is correct to 1e-10 or better for noise from 1e-6 to 5.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1 << 22
"""Most logits held at a time."""


class Divergence(NamedTuple):
    """Symmetric KL, mean over rows, and its gradients, float64."""

    value: Tensor
    """0-dim."""
    hidden: Tensor
    """(N, d)."""
    noised_hidden: Tensor
    """(N, d)."""
    weight: Tensor
    """(V, d)."""


def symmetric_kl(hidden: Tensor, difference: Tensor, weight: Tensor) -> Divergence:
    """Compute the divergence of all rows.

    Args:
        hidden: h (N, d), any dtype.
        difference: h - h' (N, d), any dtype, taken as exact.
        weight: W (V, d), any dtype.
    """
    hidden, difference, weight = (each.detach().double() for each in (hidden, difference, weight))
    found = Divergence(
        hidden.new_zeros(()),
        torch.empty_like(hidden),
        torch.empty_like(hidden),
        torch.zeros_like(weight),
    )
    count, rows = len(hidden), max(1, BLOCK // len(weight))
    for first in range(0, count, rows):
        block = slice(first, first + rows)
        h, dh = hidden[block], difference[block]
        value, g, g_noised, both = _rows(h @ weight.T, dh @ weight.T)
        found.value.add_(value.sum() / count)
        found.hidden[block] = g @ weight / count
        found.noised_hidden[block] = g_noised @ weight / count
        found.weight.add_((both.T @ h - g_noised.T @ dh) / count)
    return found


def _rows(z: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """J (R,), g, g' and g + g' (R, V)."""
    p = torch.softmax(z, -1)
    x = d - d.gather(-1, p.argmax(-1, keepdim=True))
    delta = x + torch.log1p((p * torch.expm1(-x)).sum(-1, keepdim=True))
    p_minus_q = -p * torch.expm1(-delta)
    q = p - p_minus_q
    k = (p * delta).sum(-1, keepdim=True)
    k_noised = -(q * delta).sum(-1, keepdim=True)
    g = p * (delta - k) + p_minus_q
    g_noised = -(q * (delta + k_noised) + p_minus_q)
    return (p_minus_q * delta).sum(-1), g, g_noised, delta * p_minus_q - k * p - k_noised * q
