"""Numbers from logits: loss, accuracy, the task's own score, calibration. Pure functions of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 15
TEMPERATURES = torch.logspace(-1, 1, 401, dtype=torch.float64)
"""Candidates, 1.2 % apart."""


@dataclass(frozen=True)
class Prediction:
    """Predictions of a readout for some rows: logits (N, C) of everything to predict, and the right labels."""

    logits: Tensor
    labels: Tensor
    """(N,), int64."""
    score: Callable[[], dict[str, float]]
    """The task's own score and related ones, from 0 to 1; computed on demand."""
    scales: bool = True
    """Whether a temperature is fitted: with a vocabulary as classes it takes too long."""

    def outcomes(self, *, scored: bool = True) -> dict[str, float]:
        """Nll (nats), accuracy and ece of the predictions; with ``scored``, also the task's score."""
        found = outcomes(self.logits, self.labels, "accuracy")
        return found | (self.score() if scored else {})


def outcomes(logits: Tensor, labels: Tensor, score: str) -> dict[str, float]:
    """All outcomes of one readout.

    Args:
        logits: (N, C).
        labels: (N,), int64.
        score: the task's own, accuracy, mcc or f1.

    Returns:
        nll (nats), accuracy, the score under its name, and ece, with ``BINS`` equal bins of the top probability.
    """
    logits = logits.double()
    predicted = logits.argmax(-1)
    hits = (predicted == labels).double()
    found = {
        "nll": float(F.cross_entropy(logits, labels)),
        "accuracy": float(hits.mean()),
        "ece": calibration_error(logits.softmax(-1).amax(-1), hits),
    }
    if score != "accuracy":
        found[score] = {"mcc": matthews, "f1": f1}[score](predicted, labels)
    return {name: float(f"{value:.9g}") for name, value in found.items()}


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature for logits (N, C) with the lowest loss on these rows (Guo et al. 2017)."""
    logits = logits.double()
    losses = [float(F.cross_entropy(logits / t, labels)) for t in TEMPERATURES]
    return float(TEMPERATURES[min(range(len(losses)), key=losses.__getitem__)])


def calibration_error(confidence: Tensor, hits: Tensor) -> float:
    """Expected calibration error: the mean over rows of their bin's ``|accuracy - confidence|``."""
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, hits.double() - confidence.double())
    return float(gaps.abs().sum() / len(hits))


def matthews(predicted: Tensor, labels: Tensor) -> float:
    """Matthews correlation of two classes; 0 if predictions or labels are constant."""
    tp, fp, fn, tn = _counts(predicted, labels)
    below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / below**0.5 if below else 0.0


def f1(predicted: Tensor, labels: Tensor) -> float:
    """F1 of class 1; 0 if none of it is found."""
    tp, fp, fn, _ = _counts(predicted, labels)
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


def _counts(predicted: Tensor, labels: Tensor) -> tuple[int, int, int, int]:
    pairs = [(1, 1), (1, 0), (0, 1), (0, 0)]
    tp, fp, fn, tn = (int(((predicted == p) & (labels == t)).sum()) for p, t in pairs)
    return tp, fp, fn, tn
