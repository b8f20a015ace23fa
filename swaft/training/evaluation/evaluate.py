"""Evaluates a model on every row exactly once, however many ranks share the work."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from swaft.averaging import WeightAverager, WindowSearch, search_windows
from swaft.averaging.rules import WindowsPlan
from swaft.errors import TrainingError

logger = logging.getLogger(__name__)

ROW_ID = "idx"

Scores = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found, the same on every rank."""

    scores: Scores
    """Numbers by name, ``loss`` among them."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else belongs into summary.json: intervals, how a score was computed."""
    outputs: Sequence[str] = ()
    """What the model wrote for each row, in the order of the rows; empty where it writes nothing."""


Metric = Callable[[np.ndarray, np.ndarray], Scores]
"""A score of predictions (rows,) against references (rows,)."""


def without_row_id(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's part of a batch: everything but the row numbers."""
    return {name: value for name, value in batch.items() if name != ROW_ID}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader[Any],
    metric: Metric,
    accelerator: Accelerator,
    *,
    num_rows: int,
    is_regression: bool = False,
) -> Scores:
    """Return the metric's scores and the mean ``loss`` over a data set (collective).

    accelerate gives every rank the same number of batches by repeating rows, so each row's number travels
    with its logits and repeated rows are dropped. The loss is the mean over rows of cross-entropy (squared
    error for regression) in float64: unlike the mean of batch means it does not depend on batch size or
    ranks.

    Args:
        model: as prepared; left in the mode it was found in. The generators of training are not drawn from,
            given a loader with a generator of its own.
        loader: prepared loader of batches with ``labels`` (B,) and ``idx`` (B,), row numbers 0 to
            ``num_rows`` - 1.
        metric: from `swaft.training.metrics.get_metric`.
        accelerator: that prepared both.
        num_rows: rows of the data set.
        is_regression: whether the logits (B, 1) are the prediction, rather than scores of classes (B, C).

    Raises:
        TrainingError: where rows are missing, or the loss is not finite; on every rank.
    """
    was_training = model.training
    model.eval()
    try:
        gathered = [_gather(model, batch, accelerator) for batch in loader]
    finally:
        model.train(was_training)
    logits, labels = each_row_once(
        *(torch.cat(parts) for parts in zip(*gathered, strict=True)), num_rows=num_rows
    )
    scores = dict(metric(_predictions(logits, is_regression=is_regression), labels.numpy()))
    scores["loss"] = _mean_loss(logits, labels, is_regression=is_regression)
    return scores


def mean_evaluations(
    found: Mapping[str, Mapping[str, Evaluation]], means: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Evaluation]]:
    """Return the plain mean of the scores of several splits, for each kind of weights.

    Args:
        found: evaluations by split and kind of weights (``last``, ``averaged``).
        means: by the name of the mean, the splits whose scores it is of; they have the same scores.
    """
    meant: dict[str, dict[str, Evaluation]] = {}
    for name, splits in means.items():
        meant[name] = {}
        for kind, first in found[splits[0]].items():
            columns = {
                score: [found[split][kind].scores[score] for split in splits] for score in first.scores
            }
            scores = {score: float(np.mean(column)) for score, column in columns.items()}
            meant[name][kind] = Evaluation(scores=scores)
    return meant


def best_window(
    averager: WeightAverager | None,
    evaluate_once: Callable[[], Evaluation] | None,
    metric: str,
    *,
    better: Callable[..., float] = max,
) -> WindowSearch | None:
    """Return the window of averaged weights that scores best on validation data (collective).

    None where there is nothing to choose: no averaging, another rule than ``windows``, no validation data.
    """
    if averager is None or evaluate_once is None or not isinstance(averager.plan(), WindowsPlan):
        return None
    logger.info("choosing the window of averaged weights on validation data: an evaluation for each")
    return search_windows(averager, lambda: evaluate_once().scores[metric], better=better)


def each_row_once(ids: Tensor, *columns: Tensor, num_rows: int) -> tuple[Tensor, ...]:
    """Return the columns ordered by row number, each row once.

    Args:
        ids: (N,) row numbers, some repeated.
        columns: (N, ...) each.
        num_rows: rows there should be.

    Raises:
        TrainingError: where a row number is missing or unknown.
    """
    found, first = np.unique(ids.numpy(), return_index=True)
    if not np.array_equal(found, np.arange(num_rows)):
        raise TrainingError(
            f"evaluation saw {len(found)} different rows of {num_rows}; expected each of the row numbers 0 "
            f"to {num_rows - 1} in the batches' {ROW_ID!r} (does the loader drop its last batch, or shuffle "
            "in the ids?)"
        )
    return tuple(column[first] for column in columns)


def require_finite(loss: float) -> float:
    """Return an evaluation loss that is a finite number.

    Raises:
        TrainingError: where it is none.
    """
    if not math.isfinite(loss):
        raise TrainingError(
            f"the evaluation loss is {loss}: the weights give values that are not finite; "
            f"lower train.learning_rate, or train with train.mixed_precision=bf16 rather than fp16"
        )
    return loss


def _gather(model: nn.Module, batch: Mapping[str, Tensor], accelerator: Accelerator) -> tuple[Tensor, ...]:
    """Row numbers, logits (float64) and labels of this batch from all ranks, on the host."""
    logits = model(**without_row_id(batch)).logits.float()
    gathered = accelerator.gather((batch[ROW_ID], logits, batch["labels"]))
    ids, logits, labels = (tensor.cpu() for tensor in gathered)
    return ids, logits.double(), labels


def _predictions(logits: Tensor, *, is_regression: bool) -> np.ndarray:
    return (logits.squeeze(-1) if is_regression else logits.argmax(dim=-1)).numpy()


def _mean_loss(logits: Tensor, labels: Tensor, *, is_regression: bool) -> float:
    if is_regression:
        loss = nn.functional.mse_loss(logits.squeeze(-1), labels.double())
    else:
        loss = nn.functional.cross_entropy(logits, labels)
    return require_finite(loss.item())
