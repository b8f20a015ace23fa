"""The symmetric KL divergence between two rows of logits, accurate in fp32 however close the rows are."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from swaft.errors import NoiseError
from swaft.noise.loss.options import Detach, LossOptions, check_logits, wide_dtype

_SMALL = 0.5
"""Where exp(x) - 1 switches from expm1 to the direct difference, which is more accurate for large |x|."""


def symmetric_kl(logits: Tensor, noised_logits: Tensor, *, detach: Detach = "none") -> Tensor:
    """Symmetric KL divergence of every row, KL(p||q) + KL(q||p), without a factor 1/2.

    J = sum_i (p_i - q_i)(log p_i - log q_i), p = softmax(logits), q = softmax(noised_logits)
    (Aghajanyan et al. 2021, eq. 4). Exactly 0 for equal rows, never negative. An entry that is -inf in both
    rows (padded vocabulary) counts as weight 0.

    Value and gradients are computed from d = logits - noised_logits rather than from two separate softmaxes:
    in fp32 the error stays near 1e-7 relative to the exact value for the logits given. Logits in 16 bits are upcast
    first, which cannot recover what rounding lost.

    Args:
        logits: clean logits (..., V), any floating dtype; 16-bit ones are upcast to fp32.
        noised_logits: noised logits, same shape.
        detach: what is treated as constant in the gradient. "none": nothing; "clean" / "noised": that side in both
            terms; "target": the first argument of each KL, which gives half the gradient when rows are close.

    Returns:
        J (...), fp32, or float64 for float64 logits.

    Raises:
        ConfigError: ``detach`` is unknown, or the logits do not fit each other.
        NoiseError: in a second derivative.
    """
    LossOptions(detach=detach)  # raises if it is unknown
    check_logits(logits, noised_logits)
    dtype = wide_dtype(logits, noised_logits)
    return _SymmetricKL.apply(logits.to(dtype), noised_logits.to(dtype), detach)[0]  # type: ignore[no-any-return]


class _SymmetricKL(torch.autograd.Function):
    """The gradients use the same row statistics as the value, so forward computes both.

    The gradients are outputs as well, which ties a second derivative to this node. Saved as mere constants, they
    would silently drop the divergence from it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, noised_logits: Tensor, detach: Detach) -> tuple[Tensor, ...]:
        rows = _row_statistics(logits, noised_logits)
        divergence = (rows.p_minus_q * rows.log_ratio).sum(-1)
        if not any(ctx.needs_input_grad):
            return (divergence,)
        gradients = _gradients(rows, detach)
        ctx.save_for_backward(*gradients)
        return divergence, *gradients

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        upstream = grad_outputs[0].unsqueeze(-1)
        return *(_Once.apply(upstream, gradient) for gradient in ctx.saved_tensors), None


class _Once(torch.autograd.Function):
    """The product with a gradient that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, upstream: Tensor, gradient: Tensor) -> Tensor:
        return upstream * gradient

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NoiseError(
            "The symmetric KL divergence was differentiated twice; expected once, since its gradients are computed "
            "in the forward pass. A gradient penalty needs a loss of its own: write it in plain operations."
        )


class _Rows(NamedTuple):
    """What value and gradients are computed from, each (..., V)."""

    p: Tensor
    q: Tensor
    difference: Tensor
    p_minus_q: Tensor
    log_ratio: Tensor


def _row_statistics(z: Tensor, noised_z: Tensor) -> _Rows:
    """p, q, P = p - q and delta = log p - log q, none of them by a cancelling subtraction.

    With c = d at the most probable class and x = d - c:  delta = x - Delta,  Delta = -log1p(E_p[expm1(-x)])
    while that mean is small; rows further apart use Delta - c = log S - log S' with c = max z - max z'.
    """
    absent = (z == -torch.inf) & (noised_z == -torch.inf)
    difference = (z - noised_z).masked_fill(absent, 0.0)
    p, log_p = _softmax(z)
    q, log_q = _softmax(noised_z)

    x = _centred(difference, at=p)
    mean_expm1 = (p * torch.expm1(-x)).sum(-1, keepdim=True)
    near = x + torch.log1p(mean_expm1)
    far = log_p - log_q
    log_ratio = torch.where(mean_expm1.abs() < _SMALL, near, far).masked_fill(absent, 0.0)

    p_minus_q = torch.where(log_ratio.abs() < _SMALL, -p * torch.expm1(-log_ratio), p - q)
    return _Rows(p, q, difference, p_minus_q, log_ratio)


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and its logarithm; torch's own sum wide rows less accurately in fp32."""
    shifted = z - z.amax(-1, keepdim=True)
    exponential = shifted.exp()
    total = exponential.sum(-1, keepdim=True)
    return exponential / total, shifted - total.log()


def _gradients(rows: _Rows, detach: Detach) -> tuple[Tensor, Tensor]:
    """dJ/dz = p (delta - K) + P and dJ/dz' = -(q (delta + K') + P), K = E_p[delta], K' = -E_q[delta].

    delta - K and delta + K' do not change when a constant is added to delta, so both are taken from d itself.
    """
    p_minus_q = rows.p_minus_q
    if detach == "target":
        return p_minus_q, -p_minus_q
    gradient = rows.p * _deviation(rows.difference, rows.p) + p_minus_q
    noised_gradient = -(rows.q * _deviation(rows.difference, rows.q) + p_minus_q)
    if detach == "clean":
        return torch.zeros_like(gradient), noised_gradient
    if detach == "noised":
        return gradient, torch.zeros_like(noised_gradient)
    return gradient, noised_gradient


def _centred(difference: Tensor, *, at: Tensor) -> Tensor:
    """Subtract the offset that two rows share: the difference at the most probable class."""
    return difference - difference.gather(-1, at.argmax(-1, keepdim=True))


def _deviation(difference: Tensor, weight: Tensor) -> Tensor:
    """Compute d - E_w[d], centred first so that a large common offset costs no digits."""
    x = _centred(difference, at=weight)
    return x - (weight * x).sum(-1, keepdim=True)
