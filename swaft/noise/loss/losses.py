"""The losses of logits and of hidden states. Users find them in `swaft.functional`.

The loss of logits uses plain tensor operations in the papers' notation, differentiated by autograd; the fused loss
is tested against it. Notation: z, z' clean and noised logits; p, q their softmaxes; d = z - z'; L = log sum exp z;
J = KL(p||q) + KL(q||p).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swaft.noise.loss.divergence import symmetric_kl
from swaft.noise.loss.linear import LinearInputs
from swaft.noise.loss.operator import fused_linear_loss
from swaft.noise.loss.options import (
    Detach,
    Form,
    LossOptions,
    Reduction,
    check_direction,
    check_head,
    check_logits,
    wide_dtype,
)
from swaft.noise.loss.rows import task_rows
from swaft.noise.loss.weighting import row_weights


class NoiseStabilityLoss(NamedTuple):
    """A noise-stability loss, its terms, and the terms of every row."""

    loss: Tensor
    """task_loss + divergence_weight * divergence, 0-dim; the only field that has a gradient."""
    task_loss: Tensor
    """The cross entropy and, if requested, the z term, 0-dim."""
    divergence: Tensor
    """The symmetric KL divergence, before its weight, 0-dim."""
    row_cross_entropy: Tensor
    """Cross entropy of each row, without the z term, shaped like the labels; 0 in rows that do not count."""
    row_divergence: Tensor
    """J of each row; 0 in rows that do not count."""
    row_log_normalizer: Tensor
    """L = log sum exp z of each row's clean logits; 0 in rows that do not count."""


def cross_entropy_symmetric_kl(
    logits: Tensor,
    noised_logits: Tensor,
    labels: Tensor,
    *,
    divergence_weight: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    kl_mask: Tensor | None = None,
    kl_normalizer: float | Tensor | None = None,
    reduction: Reduction = "mean",
    detach: Detach = "none",
    ce_on_noised: bool = False,
) -> NoiseStabilityLoss:
    """Cross entropy of the clean logits plus the weighted symmetric KL between clean and noised logits.

    loss = CE(logits, labels) + divergence_weight * J  (R3F, Aghajanyan et al. 2021, eq. 3), both over the
    rows whose label is not ``ignore_index``. Without such rows, every term is 0, with zero gradients.

    Args:
        logits: clean logits (..., V); 16-bit ones are upcast to fp32.
        noised_logits: noised logits, same shape.
        labels: class indices (...), int64 or int32.
        divergence_weight: lambda in the paper.
        label_smoothing: share of the target spread over all V classes; cross entropy only.
        ignore_index: label of the rows that do not count.
        z_loss: k of the term k L^2 added to each row's cross entropy, L the log of the softmax normalizer.
        token_weight: factor of each row in both terms and in their means (...), 0 or more; gets no gradient.
        kl_mask: rows of the divergence (...), bool; default: the rows whose label counts.
        kl_normalizer: what the sum of the divergences is divided by, a number or a 0-dim tensor; default: the sum
            of the weights of its rows. 0 leaves the divergence out. For fairseq's R3F: kl_mask all True, and the
            number of sentences; for ParlAI's: kl_mask all True, and the number of rows whose label counts.
        reduction: "mean", i.e. divided by the sum of the token weights, or "sum".
        detach: what the divergence treats as constant, see :func:`symmetric_kl`.
        ce_on_noised: average the cross entropies of both passes (R-Drop) instead of using only the clean one.

    Returns:
        The loss and its terms.

    Raises:
        ConfigError: options are out of range, tensors do not fit, or factors are negative; names each problem.
        DataError: a label is out of range. Labels and factors are checked on a CPU; on other devices, and when
            compiled, a wrong one makes the loss NaN.
        NoiseError: in a second derivative.
    """
    options = LossOptions(
        *(label_smoothing, z_loss, detach, ce_on_noised, 1.0, None, "direct", divergence_weight),
        *(ignore_index, token_weight, kl_mask, kl_normalizer, reduction),
    )
    check_logits(logits, noised_logits, labels)
    dtype = wide_dtype(logits, noised_logits)
    weights = row_weights(labels, options, num_classes=logits.shape[-1], dtype=dtype)
    counts_for_task, counts = weights.cross_entropy != 0, weights.counts
    left_out = ~counts.unsqueeze(-1)
    z = _rows(logits).to(dtype).masked_fill(left_out, 0.0)
    noised_z = _rows(noised_logits).to(dtype).masked_fill(left_out, 0.0)
    rows = _logit_rows(z, noised_z, weights.labels, options)
    task_loss, divergence = weights.reduce(torch.where(counts_for_task, rows.task, 0.0), rows.divergence)

    def of_rows(values: Tensor, counting: Tensor) -> Tensor:
        return torch.where(counting, values.detach(), 0.0).reshape(labels.shape)

    return NoiseStabilityLoss(
        task_loss + divergence_weight * divergence,
        task_loss.detach(),
        divergence.detach(),
        of_rows(rows.cross_entropy, counts_for_task),
        of_rows(rows.divergence, counts),
        of_rows(rows.log_normalizer, counts),
    )


def linear_cross_entropy_symmetric_kl(
    hidden: Tensor,
    noised_hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    hidden_difference: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    form: Form = "difference",
    num_counted: int | None = None,
    chunk_bytes: int | None = None,
    divergence_weight: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    kl_mask: Tensor | None = None,
    kl_normalizer: float | Tensor | None = None,
    reduction: Reduction = "mean",
    detach: Detach = "none",
    ce_on_noised: bool = False,
) -> NoiseStabilityLoss:
    """Cross entropy plus symmetric KL of a language-model head, without ever storing its full logits.

    z = softcap(logit_scale * hidden @ weight.T + bias), z' the same for ``noised_hidden``, and then the loss of
    :func:`cross_entropy_symmetric_kl`. Rows go through the head a chunk at a time. Gradients are computed in the
    forward pass and kept for the backward, so there are no second derivatives.

    Sums are fp32 (float64 for float64). Under autocast, the operands are cast inside, after the difference is
    taken. Nothing makes the host wait for an accelerator.

    Args:
        hidden: clean hidden states h (..., d).
        noised_hidden: noised hidden states h' (..., d).
        weight: weight of the head W (V, d).
        labels: class indices (...), int64 or int32.
        bias: bias of the head (V,).
        hidden_difference: h - h' (..., d), if known more accurately than from the hidden states; constant, its
            gradient goes to ``noised_hidden``. The wrong sign is an error; on an accelerator, and when compiled, a
            NaN loss.
        logit_scale: alpha, more than 0; T5 with tied embeddings: d^-1/2.
        softcap: kappa in z = kappa tanh(raw / kappa); None for none.
        form: "difference" or "direct", see ``swaft.noise.loss.Form``.
        num_counted: upper bound on the number of rows that count for either term, if the host knows one; other rows
            are left out before any product (a CPU finds them itself). The loss is NaN if more rows count.
        chunk_bytes: memory for a chunk's tensors of size V, None for a default; a chunk has at least 128 rows.
        divergence_weight: as in :func:`cross_entropy_symmetric_kl`, like all that follow.
        label_smoothing: as there.
        ignore_index: as there.
        z_loss: as there.
        token_weight: as there.
        kl_mask: as there.
        kl_normalizer: as there.
        reduction: as there.
        detach: as there.
        ce_on_noised: as there.

    Raises:
        ConfigError, DataError: as for :func:`cross_entropy_symmetric_kl`.
        NoiseError: in a second derivative, in forward mode, or under a transform of torch.func.
    """
    options = LossOptions(
        *(label_smoothing, z_loss, detach, ce_on_noised, logit_scale, softcap, form, divergence_weight),
        *(ignore_index, token_weight, kl_mask, kl_normalizer, reduction),
    )
    operands = (hidden, noised_hidden, weight, bias, hidden_difference)
    return _head_loss(operands, labels, options, num_counted=num_counted, chunk_bytes=chunk_bytes)


def _head_loss(
    operands: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    labels: Tensor,
    options: LossOptions,
    **counts: int | None,
) -> NoiseStabilityLoss:
    hidden, noised_hidden, weight, bias, hidden_difference = operands
    check_head(operands, labels, options.form, **counts)
    dtype = wide_dtype(hidden, noised_hidden, weight)
    weights = row_weights(labels, options, num_classes=weight.shape[0], dtype=dtype)
    ce_weight, kl_weight, factor = weights.in_loss(options.divergence_weight)
    if hidden_difference is not None:
        right_sign = check_direction(hidden, noised_hidden, hidden_difference)
        factor = torch.where(right_sign, factor, torch.nan)
        hidden_difference = _rows(hidden_difference.detach())
    inputs = LinearInputs(
        *(_rows(hidden), _rows(noised_hidden), hidden_difference, weight, bias),
        *(weights.labels, ce_weight, kl_weight, factor),
    )
    loss, rows = fused_linear_loss(inputs, options, **counts)
    task_loss, divergence = weights.reduce(task_rows(rows, options), rows.divergence)
    row_values = (values.reshape(labels.shape) for values in rows[:3])
    return NoiseStabilityLoss(loss, task_loss, divergence, *row_values)


def _rows(tensor: Tensor) -> Tensor:
    """(..., n) to (N, n); (n,) is one row."""
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.flatten(0, -2)


class _LogitRows(NamedTuple):
    """What each row contributes, (N,), differentiable."""

    task: Tensor
    """CE + k L^2, averaged over both passes if requested."""
    cross_entropy: Tensor
    """CE alone, averaged the same way."""
    divergence: Tensor
    """J."""
    log_normalizer: Tensor
    """L of the clean pass."""


def _logit_rows(logits: Tensor, noised_logits: Tensor, labels: Tensor, options: LossOptions) -> _LogitRows:
    """Cross entropy and divergence of rows of logits (N, V), fp32 or float64; each label (N,) a valid index."""
    log_normalizer, cross_entropy = _cross_entropy(logits, labels, options.label_smoothing)
    task = cross_entropy + options.z_loss * log_normalizer.square()
    if options.ce_on_noised:
        noised_normalizer, noised_cross_entropy = _cross_entropy(
            noised_logits, labels, options.label_smoothing
        )
        cross_entropy = (cross_entropy + noised_cross_entropy) / 2
        task = (task + noised_cross_entropy + options.z_loss * noised_normalizer.square()) / 2
    divergence = symmetric_kl(logits, noised_logits, detach=options.detach)
    return _LogitRows(task, cross_entropy, divergence, log_normalizer)


def _cross_entropy(z: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """L and CE = (1 - s)(L - z_y) + s (L - mean z) = log(1 + R) + s (z_y - mean z).

    R = sum_{i != y} exp(z_i - z_y) leaves the label out of the sum, since L - z_y loses all digits as p_y
    approaches 1, and so does p_y - 1 in its gradient.
    """
    target = z.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    others = z.scatter(-1, labels.unsqueeze(-1), -torch.inf)
    cross_entropy = torch.logaddexp(_log_sum_exp(others) - target, torch.zeros_like(target))
    if smoothing:
        cross_entropy = cross_entropy + smoothing * (target - z.mean(-1))
    return _log_sum_exp(z), cross_entropy


def _log_sum_exp(z: Tensor) -> Tensor:
    """torch.logsumexp with pairwise sums, accurate to 1e-7 in fp32 for wide rows; -inf for a row of -inf."""
    maximum = z.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).min)
    total = (z - maximum).exp().sum(-1)
    empty = total == 0
    return torch.where(empty, -torch.inf, total.masked_fill(empty, 1.0).log() + maximum.squeeze(-1))
