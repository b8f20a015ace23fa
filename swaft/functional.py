"""The losses as plain functions of tensors, named and shaped like torch.nn.functional."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swaft.errors import ConfigError
from swaft.noise.loss import Detach, symmetric_kl

__all__ = ["DivergenceLoss", "cross_entropy_symmetric_kl", "symmetric_kl"]


class DivergenceLoss(NamedTuple):
    """A noise-stability loss and the two terms it is made of, 0-dim tensors."""

    loss: Tensor
    """task_loss + divergence_weight * divergence."""
    task_loss: Tensor
    """The cross entropy."""
    divergence: Tensor
    """The symmetric KL divergence, before its weight."""


def cross_entropy_symmetric_kl(
    logits: Tensor,
    noised_logits: Tensor,
    labels: Tensor,
    *,
    divergence_weight: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    detach: Detach = "none",
    ce_on_noised: bool = False,
) -> DivergenceLoss:
    """Cross entropy of the clean logits plus the weighted symmetric KL between clean and noised logits.

    loss = CE(logits, labels) + divergence_weight * J  (R3F, Aghajanyan et al. 2021, eq. 3), both over the
    rows whose label is not ``ignore_index``. Without such a row every term is 0, with zero gradients.

    Args:
        logits: clean logits (..., V); 16-bit ones are upcast to fp32.
        noised_logits: noised logits, same shape.
        labels: class indices (...), int64.
        divergence_weight: the lambda of the paper.
        label_smoothing: share of the target spread over all V classes, cross entropy only.
        ignore_index: label of the rows that do not count.
        reduction: over counted rows.
        detach: what the divergence holds constant, see :func:`symmetric_kl`.
        ce_on_noised: average the cross entropies of both passes (R-Drop) instead of the clean one's.

    Returns:
        loss, task_loss and divergence.
    """
    if reduction not in ("mean", "sum"):
        raise ConfigError(f"reduction is {reduction!r}; expected mean or sum.")
    counted = labels != ignore_index
    rows = counted.sum().clamp(min=1) if reduction == "mean" else 1

    def cross_entropy(z: Tensor) -> Tensor:
        wide = z.to(torch.promote_types(z.dtype, torch.float32)).flatten(0, -2)
        total = F.cross_entropy(
            wide,
            labels.flatten(),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="sum",
        )
        return total / rows

    task_loss = cross_entropy(logits)
    if ce_on_noised:
        task_loss = (task_loss + cross_entropy(noised_logits)) / 2
    row_divergence = symmetric_kl(logits, noised_logits, detach=detach)
    divergence = torch.where(counted, row_divergence, 0.0).sum() / rows
    return DivergenceLoss(task_loss + divergence_weight * divergence, task_loss, divergence)
