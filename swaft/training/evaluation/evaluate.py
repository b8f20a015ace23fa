"""Evaluates a model on every row exactly once, however many ranks share the work; scores classifiers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from swaft.errors import TrainingError
from swaft.training.data.texts import IGNORED
from swaft.training.metrics import Metric, Scores
from swaft.training.run.folder import RunFolder

ROW_ID = "idx"
TOKEN_SCORES = ("loss", "perplexity", "token_accuracy")
"""Names of the scores of `evaluate_answers_given`; the first is the main one."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The results of an evaluation, the same on every rank."""

    scores: Scores
    """Numbers by name, including ``loss``."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else goes into summary.json: intervals, how a score was computed."""
    outputs: Sequence[str] = ()
    """The text that the model generated for each row, in row order; empty if it generates none."""


def without_row_id(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's part of a batch: everything but the row numbers."""
    return {name: value for name, value in batch.items() if name != ROW_ID}


def evaluate_classes(
    model: nn.Module, loader: DataLoader[Any], accelerator: Accelerator, *, metric: Metric, num_rows: int
) -> Evaluation:
    """Return the metric's scores and the mean ``loss`` over a dataset (collective).

    The loss is the mean over rows of cross-entropy (squared error for regression) in float64: unlike the mean of
    batch means it does not depend on batch size or ranks.

    Args:
        model: the prepared model; its training mode is restored.
        loader: prepared loader of batches with ``labels`` (B,) and ``idx`` (B,), row numbers from 0.
        accelerator: the one that prepared both.
        metric: scores predictions: the class with the largest logit, or the one logit of a regression.
        num_rows: rows in the dataset.

    Raises:
        TrainingError: rows are missing, or the loss is not finite; on every rank.
    """

    def measure(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return batch["labels"], model(**without_row_id(batch)).logits.float()

    labels, logits = measured_once(model, loader, accelerator, measure, num_rows=num_rows)
    logits = logits.double()
    if metric.is_regression:
        predictions = logits.squeeze(-1)
        loss = nn.functional.mse_loss(predictions, labels.double())
    else:
        predictions = logits.argmax(dim=-1)
        loss = nn.functional.cross_entropy(logits, labels)
    scores = metric.compute(predictions.numpy(), labels.numpy())
    return Evaluation(scores={**scores, "loss": require_finite(loss.item())})


def evaluate_answers_given(
    model: nn.Module, loader: DataLoader[Any], accelerator: Accelerator, *, num_rows: int
) -> Evaluation:
    """Return `TOKEN_SCORES` over the tokens that are learnt (collective).

    They are sums over all tokens divided by their number, so they depend neither on batch size nor on ranks.

    Args:
        model: the prepared model; its training mode is restored.
        loader: prepared loader of batches with ``labels`` (B, L) and ``idx`` (B,), row numbers from 0.
        accelerator: the one that prepared both.
        num_rows: rows in the dataset.

    Raises:
        TrainingError: rows are missing, or the loss is not finite; on every rank.
    """

    def measure(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        inputs = without_row_id(batch)
        targets = inputs.pop("labels")[:, 1:]  # with them the model would compute a loss of its own
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        right = (logits.argmax(dim=-1) == targets).sum(dim=1)
        return summed_losses(logits, targets), right, (targets != IGNORED).sum(dim=1)

    sums, right, counts = measured_once(model, loader, accelerator, measure, num_rows=num_rows)
    loss = require_finite((sums.sum() / counts.sum()).item())
    accuracy = (right.sum() / counts.sum()).item()
    found = (loss, math.exp(min(loss, 700.0)), accuracy)
    return Evaluation(scores=dict(zip(TOKEN_SCORES, found, strict=True)))


def summed_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross entropy of each row, (B,) float64.

    Args:
        logits: (B, L, V). Copied one row at a time: of a large vocabulary the batch's may fill half of a GPU.
        targets: (B, L), `IGNORED` where nothing counts.
    """
    each = [
        nn.functional.cross_entropy(row.float(), target, ignore_index=IGNORED, reduction="none")
        for row, target in zip(logits, targets, strict=True)
    ]
    return torch.stack(each).sum(dim=1, dtype=torch.float64)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context without gradients in which a model is in eval mode; its training mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def measured_once(
    model: nn.Module,
    loader: DataLoader[Any],
    accelerator: Accelerator,
    measure: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]],
    *,
    num_rows: int,
) -> tuple[Tensor, ...]:
    """Measure every batch on the rank that has it, in eval mode, and return each row once (collective).

    accelerate gives every rank the same number of batches by repeating rows, so each row's number is gathered with
    its measurements, and repeated rows are dropped.

    Args:
        model: the prepared model; its training mode is restored. The random generators of training are left alone
            if the loader has its own generator.
        loader: prepared loader of batches with ``idx`` (B,), row numbers from 0.
        accelerator: the one that prepared both.
        measure: returns columns of a batch, (B, ...) each, with the same shape for all batches.
        num_rows: rows in the dataset.

    Returns:
        The columns in row order, (``num_rows``, ...) each, on the host.

    Raises:
        TrainingError: rows are missing; on every rank.
    """
    batches = []
    with evaluating(model):
        for batch in loader:
            measured = accelerator.gather((batch[ROW_ID], *measure(batch)))
            batches.append([part.cpu() for part in measured])
    return each_row_once(*map(torch.cat, zip(*batches, strict=True)), num_rows=num_rows)


def each_row_once(ids: Tensor, *columns: Tensor, num_rows: int) -> tuple[Tensor, ...]:
    """Return the columns ordered by row number, each row once.

    Args:
        ids: (N,) row numbers, some repeated.
        columns: (N, ...) each.
        num_rows: rows there should be.

    Raises:
        TrainingError: a row number is missing or unknown.
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
    """Return an evaluation loss if it is finite.

    Raises:
        TrainingError: it is not.
    """
    if not math.isfinite(loss):
        raise TrainingError(
            f"the evaluation loss is {loss}: the weights give values that are not finite; "
            f"lower train.learning_rate, or train with train.mixed_precision=bf16 rather than fp16"
        )
    return loss


def mean_evaluations(
    found: Mapping[str, Mapping[str, Evaluation]], means: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Evaluation]]:
    """Return the plain mean of the scores of several splits, for each kind of weights.

    Args:
        found: evaluations by split and kind of weights (``last``, ``averaged``).
        means: for each mean, by name, its splits; they have the same scores.
    """

    def mean(splits: Sequence[str], kind: str) -> Evaluation:
        each = [found[split][kind].scores for split in splits]
        return Evaluation(
            scores={name: float(np.mean([scores[name] for scores in each])) for name in each[0]}
        )

    return {name: {kind: mean(splits, kind) for kind in found[splits[0]]} for name, splits in means.items()}


def write_samples(
    folder: RunFolder,
    evaluations: Mapping[str, Mapping[str, Evaluation]],
    rows: Mapping[str, Dataset],
    num_samples: int,
    *,
    columns: Sequence[str] = ("source", "references"),
) -> None:
    """Write the first rows of each split with the outputs of the last and the averaged weights.

    Every split with outputs gets a file ``samples-<split>.jsonl``, one row per line, with these columns.
    """
    for split, kinds in evaluations.items():
        written = {kind: found.outputs[:num_samples] for kind, found in kinds.items() if found.outputs}
        if written and num_samples:
            first = rows[split][:num_samples]
            shown = {name: first[name] for name in columns} | written
            lines = [dict(zip(shown, row, strict=True)) for row in zip(*shown.values(), strict=True)]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            folder.write_text(f"samples-{split}.jsonl", text)
