"""How much every row counts: labels, token weights, masks and reductions made into one weight a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swaft.errors import ConfigError
from swaft.noise.loss.options import Reduction, check_reduction

_NO_GRADIENT = 1e-30
"""Stands for a divergence_weight of 0: rows of the divergence stay counted, gradients vanish beside others."""


class RowWeights(NamedTuple):
    """Weights of N rows, fp32 (float64 for a float64 loss) on the labels' device."""

    labels: Tensor
    """Class indices (N,); 0 where the cross entropy does not count, so always a valid index."""
    cross_entropy: Tensor
    """omega (N,): token weight in counted rows, 0 elsewhere."""
    divergence: Tensor
    """omega' (N,): token weight in the rows of the divergence, 0 elsewhere."""
    task_normalizer: Tensor
    """What the sum of the weighted cross entropies is divided by, 0-dim; 0 where nothing counts."""
    divergence_normalizer: Tensor
    """What the sum of the weighted divergences is divided by, 0-dim; 0 where nothing counts."""

    @property
    def counts(self) -> Tensor:
        """Rows (N,) that count for either term."""
        return (self.cross_entropy != 0) | (self.divergence != 0)

    def in_loss(self, divergence_weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of the rows in one sum that is the loss, a factor common to all of them taken out.

        loss = factor * sum_rows (ce CE + kl J).  The factor is 1 / task_normalizer where the cross entropy
        counts, so that weights of the cross entropy are of order 1 whatever the number of rows.

        Returns:
            ce (N,), kl (N,) and factor (0-dim).
        """
        task_counts = self.task_normalizer != 0
        common = torch.where(task_counts, self.task_normalizer, self.divergence_normalizer)
        relative = (divergence_weight or _NO_GRADIENT) * common * _inverse(self.divergence_normalizer)
        return self.cross_entropy * task_counts, self.divergence * relative, _inverse(common)

    def reduce(self, task_rows: Tensor, divergence_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Task loss and divergence, 0-dim, from those of all rows (N,); 0 where nothing counts."""
        task_loss = (self.cross_entropy * task_rows).sum() * _inverse(self.task_normalizer)
        divergence = (self.divergence * divergence_rows).sum() * _inverse(self.divergence_normalizer)
        return task_loss, divergence


def row_weights(
    labels: Tensor,
    *,
    ignore_index: int,
    token_weight: Tensor | None,
    kl_mask: Tensor | None,
    kl_normalizer: float | Tensor | None,
    reduction: Reduction,
    dtype: torch.dtype,
) -> RowWeights:
    """Weigh the rows of a loss.

    Args:
        labels: class indices (...), int64.
        ignore_index: label of the rows that do not count.
        token_weight: factor of each row (...), None for 1.
        kl_mask: rows of the divergence (...), bool; None for those whose label counts.
        kl_normalizer: what the sum of the divergences is divided by; None for the sum of their weights
            (reduction "mean") or 1 ("sum").
        reduction: "mean" divides the cross entropy by the sum of its weights.
        dtype: of the weights.

    Raises:
        ConfigError: for an unknown reduction, or shapes that are not the labels'.
    """
    check_reduction(reduction)
    for name, tensor in (("token_weight", token_weight), ("kl_mask", kl_mask)):
        if tensor is not None and tensor.shape != labels.shape:
            raise ConfigError(
                f"{name} has shape {tuple(tensor.shape)}; expected that of the labels, {tuple(labels.shape)}."
            )
    counted = (labels != ignore_index).flatten()
    weight = (
        torch.ones_like(counted, dtype=dtype)
        if token_weight is None
        else token_weight.detach().flatten().to(dtype)
    )
    cross_entropy = torch.where(counted, weight, 0.0)
    divergence = cross_entropy if kl_mask is None else torch.where(kl_mask.flatten(), weight, 0.0)
    one = torch.ones((), dtype=dtype, device=labels.device)
    if kl_normalizer is not None:
        divergence_normalizer = one * kl_normalizer
    else:
        divergence_normalizer = divergence.sum() if reduction == "mean" else one
    return RowWeights(
        labels=torch.where(counted, labels.flatten(), 0),
        cross_entropy=cross_entropy,
        divergence=divergence,
        task_normalizer=cross_entropy.sum() if reduction == "mean" else one,
        divergence_normalizer=divergence_normalizer,
    )


def _inverse(number: Tensor) -> Tensor:
    """1 / number, and 0 for 0."""
    return torch.where(number == 0, 0.0, 1 / torch.where(number == 0, 1.0, number))
