"""The symmetric KL of a linear head in float64, value and gradients, a few rows at a time; no code of the library.

With z = h W^T and d = (h - h') W^T = z - z', p = softmax(z), q = softmax(z - d), all in float64:

    delta = log p - log q = x + log1p(E_p[expm1(-x)]),  x = d - E_p[d]
    P = p - q = -p expm1(-delta),  J = sum P delta,  K = E_p[delta]
    g  = dJ/dz  = p (delta - K) + P,    g' = dJ/dz' = -(q (delta + J - K) + P),    g + g' = P (delta - K) - J q
    dh = g W,   dh' = g' W,   dW = g^T h + g'^T h' = (g + g')^T h - g'^T (h - h')

d comes from a separate product and dW from the split sum, so small differences lose few digits. Tests hold
`closed_form` to arithmetic in 60 digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1 << 22
"""Most logits held at a time."""


class OfRows(NamedTuple):
    """Symmetric KL of each row, and its gradients, float64."""

    value: Tensor
    """J (R,)."""
    clean: Tensor
    """g (R, V)."""
    noised: Tensor
    """g' (R, V)."""
    total: Tensor
    """g + g' (R, V)."""


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
        rows_of = closed_form(h @ weight.T, dh @ weight.T)
        found.value.add_(rows_of.value.sum() / count)
        found.hidden[block] = rows_of.clean @ weight / count
        found.noised_hidden[block] = rows_of.noised @ weight / count
        found.weight.add_((rows_of.total.T @ h - rows_of.noised.T @ dh) / count)
    return found


def closed_form(z: Tensor, difference: Tensor) -> OfRows:
    """J and its gradients of rows of logits z (R, V) and z' = z - difference, both float64."""
    assert z.dtype == difference.dtype == torch.float64
    p = z.softmax(-1)
    x = difference - (p * difference).sum(-1, keepdim=True)
    delta = x + torch.log1p((p * torch.expm1(-x)).sum(-1, keepdim=True))
    p_minus_q = torch.where(delta > -1, -p * torch.expm1(-delta), p - (z - difference).softmax(-1))
    q = p - p_minus_q
    value = (p_minus_q * delta).sum(-1, keepdim=True)
    k = (p * delta).sum(-1, keepdim=True)
    clean = p * (delta - k) + p_minus_q
    noised = -(q * (delta + value - k) + p_minus_q)
    total = p_minus_q * (delta - k) - value * q
    total = torch.where((delta.abs() > 1).any(-1, keepdim=True), clean + noised, total)
    return OfRows(value.squeeze(-1), clean, noised, total)
