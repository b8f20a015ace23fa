"""How much every row counts: labels, token weights, masks and reductions combined into one weight per row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swaft.errors import ConfigError, DataError
from swaft.noise.loss.options import LossOptions, elsewhere, host_knows, number_problems


class RowWeights(NamedTuple):
    """Weights of N rows, fp32 (float64 for a float64 loss) on the labels' device."""

    labels: Tensor
    """Class indices (N,); 0 in rows whose cross entropy does not count, so always a valid index."""
    cross_entropy: Tensor
    """omega (N,): token weight in counted rows, 0 elsewhere."""
    divergence: Tensor
    """omega' (N,): token weight in the rows of the divergence, 0 elsewhere."""
    task_normalizer: Tensor
    """What the sum of the weighted cross entropies is divided by, 0-dim; 0 if nothing counts."""
    divergence_normalizer: Tensor
    """What the sum of the weighted divergences is divided by, 0-dim; 0 if nothing counts."""

    @property
    def counts(self) -> Tensor:
        """Rows (N,) that count for either term."""
        return (self.cross_entropy != 0) | (self.divergence != 0)

    def in_loss(self, divergence_weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of the rows in the loss, written as one sum with a common factor taken out.

        loss = factor * sum_rows (ce CE + kl J). The factor is 1 / task_normalizer if the cross entropy counts, so
        that the weights of the cross entropy are of order 1 for any number of rows.

        Returns:
            ce (N,), kl (N,) and factor (0-dim).
        """
        common = torch.where(self.task_normalizer != 0, self.task_normalizer, self.divergence_normalizer)
        kl = self.divergence * (divergence_weight * common * _inverse(self.divergence_normalizer))
        # A row of the divergence stays counted, and so has statistics, even if its weight becomes 0.
        kl = torch.where((self.divergence != 0) & (kl == 0), torch.finfo(kl.dtype).tiny, kl)
        return self.cross_entropy, kl, _inverse(common)

    def reduce(self, task_rows: Tensor, divergence_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Task loss and divergence, 0-dim, from those of all rows (N,); 0 if nothing counts."""
        task_loss = (self.cross_entropy * task_rows).sum() * _inverse(self.task_normalizer)
        divergence = (self.divergence * divergence_rows).sum() * _inverse(self.divergence_normalizer)
        return task_loss, divergence


def row_weights(labels: Tensor, options: LossOptions, *, num_classes: int, dtype: torch.dtype) -> RowWeights:
    """Compute the weights of the rows of a loss.

    Args:
        labels: class indices (...), int64 or int32.
        options: of the loss; some decide how much each row counts.
        num_classes: V. Labels out of range are not used as indices; if the host cannot check, they make the loss
            NaN.
        dtype: of the weights.

    Raises:
        ConfigError: tensors do not fit the labels, or (if the host can check) factors are negative or not finite.
        DataError: a label is out of range (if the host can check).
    """
    _check(labels, options)
    ignore_index, kl_mask, kl_normalizer = options.ignore_index, options.kl_mask, options.kl_normalizer
    labels = labels.flatten().long()
    counted = labels != ignore_index
    in_range = (labels >= 0) & (labels < num_classes)
    _check_range(labels, counted & ~in_range, num_classes, ignore_index)
    of_divergence = counted if kl_mask is None else kl_mask.flatten()
    weight = torch.ones_like(counted, dtype=dtype)
    if options.token_weight is not None:
        given = torch.where(counted | of_divergence, options.token_weight.detach().flatten().to(dtype), 0.0)
        weight = _not_negative("token_weight", given)
    cross_entropy = torch.where(counted, torch.where(in_range, weight, torch.nan), 0.0)
    divergence = torch.where(of_divergence, weight, 0.0)
    one = torch.ones((), dtype=dtype, device=labels.device)
    if kl_normalizer is not None:
        if isinstance(kl_normalizer, Tensor):
            kl_normalizer = _not_negative("kl_normalizer", kl_normalizer.detach().to(dtype))
        divergence_normalizer = one * kl_normalizer
    else:
        divergence_normalizer = divergence.sum() if options.reduction == "mean" else one
    return RowWeights(
        labels=torch.where(counted & in_range, labels, 0),
        cross_entropy=cross_entropy,
        divergence=divergence,
        task_normalizer=cross_entropy.sum() if options.reduction == "mean" else one,
        divergence_normalizer=divergence_normalizer,
    )


def _check(labels: Tensor, options: LossOptions) -> None:
    """Refuse labels that are not class indices, and tensors that do not fit them."""
    problems = []
    if labels.dtype not in (torch.int64, torch.int32):
        problems.append(f"labels is {labels.dtype}; expected torch.int64 or torch.int32.")
    normalizer = options.kl_normalizer
    rows = {"token_weight": options.token_weight, "kl_mask": options.kl_mask}
    problems += [
        f"{name} has shape {tuple(tensor.shape)}; expected that of the labels, {tuple(labels.shape)}."
        for name, tensor in rows.items()
        if tensor is not None and tensor.shape != labels.shape
    ]
    problems += elsewhere("the labels", labels, **rows)
    if options.kl_mask is not None and options.kl_mask.dtype != torch.bool:
        problems.append(
            f"kl_mask is {options.kl_mask.dtype}; expected torch.bool. Pass factors as token_weight."
        )
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            problems.append(
                f"kl_normalizer has shape {tuple(normalizer.shape)}; expected a number or a 0-dim tensor."
            )
        if normalizer.device.type != "cpu":  # a CPU scalar works with every device
            problems += elsewhere("the labels", labels, kl_normalizer=normalizer)
    elif normalizer is not None:
        problems += number_problems("kl_normalizer", normalizer, "0 or more", lambda n: n >= 0)
    problems += [
        f"{name} requires a gradient; expected a constant, since it gets no gradient. Detach it."
        for name, factor in (("token_weight", options.token_weight), ("kl_normalizer", normalizer))
        if isinstance(factor, Tensor) and factor.requires_grad and torch.is_grad_enabled()
    ]
    if problems:
        raise ConfigError(problems)


def _check_range(labels: Tensor, wrong: Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse labels out of range, unless checking would make the host wait or break a graph."""
    if not host_knows(wrong) or not bool(wrong.any()):
        return
    raise DataError(
        f"{int(wrong.sum())} of {labels.numel()} labels are not valid classes, the first of them "
        f"{int(labels[wrong][0])}; expected 0 to {num_classes - 1}, or ignore_index={ignore_index} in rows "
        "that do not count."
    )


def _not_negative(name: str, factors: Tensor) -> Tensor:
    """Refuse factors that are negative or not finite; if the host would have to wait, replace them by NaN."""
    wrong = ~((factors >= 0) & (factors < torch.inf))
    if host_knows(wrong) and bool(wrong.any()):
        raise ConfigError(
            f"{name} has {int(wrong.sum())} of {wrong.numel()} values that are negative or not finite, the first "
            f"{float(factors[wrong][0]):g}; expected 0 or more in every row that counts."
        )
    return torch.where(wrong, torch.nan, factors)


def _inverse(number: Tensor) -> Tensor:
    """1 / number, and 0 for 0."""
    return torch.where(number == 0, 0.0, 1 / torch.where(number == 0, 1.0, number))
