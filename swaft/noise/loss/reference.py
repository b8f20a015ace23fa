"""The loss in plain tensor operations and the paper's letters: slow, any dtype, differentiable by autograd.

The fused loss is held to this file. Letters: z, z' clean and noised logits; p, q their softmaxes;
d = z - z'; L = log sum exp z; J = KL(p||q) + KL(q||p).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swaft.noise.loss.divergence import symmetric_kl_of_difference
from swaft.noise.loss.options import LossOptions


class Rows(NamedTuple):
    """What each row contributes, (...), differentiable."""

    task: Tensor
    """CE + k L^2, averaged over both passes if asked for."""
    cross_entropy: Tensor
    """CE alone, averaged likewise."""
    divergence: Tensor
    """J."""
    log_normalizer: Tensor
    """L of the clean pass."""


def reference_rows(
    logits: Tensor, noised_logits: Tensor, difference: Tensor, labels: Tensor, options: LossOptions
) -> Rows:
    """Cross entropy and divergence of every row of logits.

    Args:
        logits: z (..., V), fp32 or float64.
        noised_logits: z', same shape and dtype.
        difference: z - z', as exact as it is known; no gradient goes through it.
        labels: y (...), int64, each a valid index.
        options: of the loss; scale, soft-cap and form are the head's, see :func:`reference_logits`.
    """
    log_normalizer, cross_entropy = _cross_entropy(logits, labels, options.label_smoothing)
    task = cross_entropy + options.z_loss * log_normalizer.square()
    if options.ce_on_noised:
        noised_normalizer, noised_cross_entropy = _cross_entropy(
            noised_logits, labels, options.label_smoothing
        )
        cross_entropy = (cross_entropy + noised_cross_entropy) / 2
        task = (task + noised_cross_entropy + options.z_loss * noised_normalizer.square()) / 2
    divergence = symmetric_kl_of_difference(logits, noised_logits, difference, detach=options.detach)
    return Rows(task, cross_entropy, divergence, log_normalizer)


def reference_logits(
    hidden: Tensor,
    noised_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden_difference: Tensor,
    options: LossOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """z, z' and d = z - z' of a language-model head.

    raw = alpha h W^T + b,  z = kappa tanh(raw / kappa),  and with draw = alpha (h - h') W^T
    d = kappa tanh(draw / kappa) (1 - tanh(raw / kappa) tanh((raw - draw) / kappa)),
    which is the difference of the two soft-capped logits without a cancellation.

    Args:
        hidden: h (..., d).
        noised_hidden: h', same shape.
        weight: W (V, d).
        bias: b (V,), or None.
        hidden_difference: h - h', as exact as it is known; no gradient goes through it.
        options: of the loss.

    Returns:
        z and z' (..., V), differentiable, and d (..., V), detached.
    """
    raw = options.logit_scale * hidden @ weight.mT
    noised_raw = options.logit_scale * noised_hidden @ weight.mT
    if bias is not None:
        raw, noised_raw = raw + bias, noised_raw + bias
    draw = options.logit_scale * hidden_difference.detach() @ weight.detach().mT
    kappa = options.softcap
    if kappa is None:
        return raw, noised_raw, draw
    squashed, noised_squashed = torch.tanh(raw / kappa), torch.tanh(noised_raw / kappa)
    factor = 1 - squashed.detach() * torch.tanh((raw.detach() - draw) / kappa)
    return kappa * squashed, kappa * noised_squashed, kappa * torch.tanh(draw / kappa) * factor


def _cross_entropy(z: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """L and CE = (1 - s)(L - z_y) + s (L - mean z) = log(1 + R) + s (z_y - mean z).

    R = sum_{i != y} exp(z_i - z_y) leaves the label out of the sum, since L - z_y loses all digits as p_y
    comes close to 1, and so does p_y - 1 in its gradient.
    """
    target = z.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    others = z.scatter(-1, labels.unsqueeze(-1), -torch.inf)
    cross_entropy = torch.logaddexp(_log_sum_exp(others) - target, torch.zeros_like(target))
    if smoothing:
        cross_entropy = cross_entropy + smoothing * (target - z.mean(-1))
    return _log_sum_exp(z), cross_entropy


def _log_sum_exp(z: Tensor) -> Tensor:
    """torch.logsumexp by pairwise sums, which keep 1e-7 in fp32 over a wide row; -inf for a row of -inf."""
    maximum = z.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).min)
    total = (z - maximum).exp().sum(-1)
    empty = total == 0
    return torch.where(empty, -torch.inf, total.masked_fill(empty, 1.0).log() + maximum.squeeze(-1))
