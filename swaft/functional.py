"""The losses as plain functions of tensors, named and shaped like torch.nn.functional."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swaft.noise.loss.checks import check_direction, check_head, check_logits
from swaft.noise.loss.divergence import symmetric_kl
from swaft.noise.loss.linear import LinearInputs
from swaft.noise.loss.operator import fused_linear_loss
from swaft.noise.loss.options import Detach, Form, LossOptions, Reduction, check_divergence_weight
from swaft.noise.loss.reference import reference_rows
from swaft.noise.loss.rows import task_rows
from swaft.noise.loss.weighting import row_weights

__all__ = [
    "NoiseStabilityLoss",
    "cross_entropy_symmetric_kl",
    "linear_cross_entropy_symmetric_kl",
    "symmetric_kl",
]


class NoiseStabilityLoss(NamedTuple):
    """A noise-stability loss, the terms it is made of, and those of every row."""

    loss: Tensor
    """task_loss + divergence_weight * divergence, 0-dim; the only one that has a gradient."""
    task_loss: Tensor
    """The cross entropy and, where asked for, the z term, 0-dim."""
    divergence: Tensor
    """The symmetric KL divergence, before its weight, 0-dim."""
    row_cross_entropy: Tensor
    """Cross entropy of each row, without the z term, shaped like the labels; 0 where it counts for nothing."""
    row_divergence: Tensor
    """J of each row; 0 in rows that count for nothing."""
    row_log_normalizer: Tensor
    """L = log sum exp z of each row's clean logits; 0 in rows that count for nothing."""


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
    rows whose label is not ``ignore_index``. Without such a row every term is 0, with zero gradients.

    Args:
        logits: clean logits (..., V); 16-bit ones are upcast to fp32.
        noised_logits: noised logits, same shape.
        labels: class indices (...), int64 or int32.
        divergence_weight: the lambda of the paper.
        label_smoothing: share of the target spread over all V classes, cross entropy only.
        ignore_index: label of the rows that do not count.
        z_loss: k of the term k L^2 added to each row's cross entropy, L the log of the softmax normalizer.
        token_weight: factor of each row in both terms and in their means (...), 0 or more; constant.
        kl_mask: rows of the divergence (...), bool, if not those whose label counts.
        kl_normalizer: what the sum of the divergences is divided by, a number or a 0-dim tensor, if not the
            sum of its rows' weights; 0 leaves the divergence out. fairseq's R3F: kl_mask all True, the number
            of sentences; ParlAI's: kl_mask all True, the number of rows whose label counts.
        reduction: "mean" by the sum of the token weights, or "sum".
        detach: what the divergence holds constant, see :func:`symmetric_kl`.
        ce_on_noised: average the cross entropies of both passes (R-Drop) instead of the clean one's.

    Returns:
        The loss and its terms.

    Raises:
        ConfigError: naming options out of range, tensors that do not fit, or factors that are negative.
        DataError: for a label out of range. Labels and factors are looked at on a CPU; elsewhere, and compiled, a
            wrong one makes the loss NaN.
        NoiseError: in a second derivative.
    """
    check_divergence_weight(divergence_weight)
    options = LossOptions(label_smoothing, z_loss, detach, ce_on_noised)
    check_logits(logits, noised_logits, labels)
    dtype = torch.promote_types(torch.promote_types(logits.dtype, noised_logits.dtype), torch.float32)
    weights = row_weights(
        labels,
        num_classes=logits.shape[-1],
        ignore_index=ignore_index,
        token_weight=token_weight,
        kl_mask=kl_mask,
        kl_normalizer=kl_normalizer,
        reduction=reduction,
        dtype=dtype,
    )
    z, noised_z = (_rows(tensor).to(dtype) for tensor in (logits, noised_logits))
    counts_for_task, counts = weights.cross_entropy != 0, weights.counts
    z, noised_z = (tensor.masked_fill(~counts.unsqueeze(-1), 0.0) for tensor in (z, noised_z))
    rows = reference_rows(z, noised_z, (z - noised_z).detach(), weights.labels, options)
    task_loss, divergence = weights.reduce(
        torch.where(counts_for_task, rows.task, 0.0),
        torch.where(weights.divergence != 0, rows.divergence, 0.0),
    )

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
    """Cross entropy plus symmetric KL of a language-model head, without ever holding its logits.

    z = softcap(logit_scale * hidden @ weight.T + bias), z' likewise of ``noised_hidden``, and then the loss of
    :func:`cross_entropy_symmetric_kl`. Rows go through the head a chunk at a time, gradients are made in the
    forward pass and kept for the backward, which can be had once: no second derivatives.

    With form "difference" z - z' is not a subtraction of logits but a product of its own, h - h' times the
    weight, and has its digits at every size of noise, also with 16-bit operands; with bf16 operands it serves
    spreads of z - z' up to about 2. "direct" takes z' from ``noised_hidden``: right where the passes are far
    apart (R-Drop, independent dropout masks), with bf16 operands from a spread of about 0.05 on.

    Sums are fp32 (float64 for float64). Under autocast the operands are cast inside, after the difference is
    taken. Nothing makes the host wait for an accelerator.

    Args:
        hidden: clean hidden states h (..., d).
        noised_hidden: noised hidden states h' (..., d).
        weight: of the head W (V, d).
        labels: class indices (...), int64 or int32.
        bias: of the head (V,).
        hidden_difference: h - h' (..., d) in the best precision there is, if that is better than what
            ``hidden`` and ``noised_hidden`` have left; constant, its gradient goes to ``noised_hidden``. The
            wrong sign is an error; on an accelerator, and compiled, a NaN loss.
        logit_scale: alpha, more than 0; T5 with tied embeddings: d^-1/2.
        softcap: kappa of z = kappa tanh(raw / kappa); None for none.
        form: "difference" or "direct".
        num_counted: upper bound of the rows that count for either term, if the host knows one. Others are
            left out before any product; a CPU finds them itself. If more rows count than this says, the loss
            is NaN.
        chunk_bytes: what all tensors of size V of one chunk may take; None for a default by device. A chunk has
            128 rows at the least.
        divergence_weight: the lambda of the paper.
        label_smoothing: as in :func:`cross_entropy_symmetric_kl`, like all that follow.
        ignore_index: label of the rows that do not count.
        z_loss: k of the term k L^2.
        token_weight: factor of each row (...).
        kl_mask: rows of the divergence (...), bool.
        kl_normalizer: what the sum of the divergences is divided by.
        reduction: "mean" or "sum".
        detach: what the divergence holds constant.
        ce_on_noised: average the cross entropies of both passes.

    Returns:
        The loss and its terms.

    Raises:
        ConfigError, DataError: as :func:`cross_entropy_symmetric_kl`.
        NoiseError: in a second derivative, in forward mode, or under a transform of torch.func.
    """
    check_divergence_weight(divergence_weight)
    options = LossOptions(label_smoothing, z_loss, detach, ce_on_noised, logit_scale, softcap, form)
    check_head(hidden, noised_hidden, weight, labels, bias, hidden_difference, form, num_counted, chunk_bytes)
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, noised_hidden.dtype), weight.dtype)
    weights = row_weights(
        labels,
        num_classes=weight.shape[0],
        ignore_index=ignore_index,
        token_weight=token_weight,
        kl_mask=kl_mask,
        kl_normalizer=kl_normalizer,
        reduction=reduction,
        dtype=torch.promote_types(dtype, torch.float32),
    )
    ce_weight, kl_weight, factor = weights.in_loss(divergence_weight)
    if hidden_difference is not None:
        right_sign = check_direction(hidden, noised_hidden, hidden_difference)
        factor = torch.where(right_sign, factor, torch.nan)
    inputs = LinearInputs(
        hidden=_rows(hidden),
        noised_hidden=_rows(noised_hidden),
        hidden_difference=None if hidden_difference is None else _rows(hidden_difference.detach()),
        weight=weight,
        bias=bias,
        labels=weights.labels,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        factor=factor,
    )
    loss, rows = fused_linear_loss(inputs, options, num_counted=num_counted, chunk_bytes=chunk_bytes)
    task_loss, divergence = weights.reduce(task_rows(rows, options), rows.divergence)
    row_values = (values.reshape(labels.shape) for values in rows[:3])
    return NoiseStabilityLoss(loss, task_loss, divergence, *row_values)


def _rows(tensor: Tensor) -> Tensor:
    """(..., n) to (N, n); (n,) is one row."""
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.flatten(0, -2)
