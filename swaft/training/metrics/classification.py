"""Scores class ids and scores against references: arrays in, a dict of named numbers out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from swaft.errors import ConfigError
from swaft.training.metrics.names import NAMES, refuse_unfit

logger = logging.getLogger(__name__)

Scores = dict[str, float]

# The metric GLUE reports, where it is not accuracy (Wang et al. 2019, table 1).
TASK_METRICS = {
    "cola": "matthews_correlation",
    "mrpc": "accuracy_f1",
    "qqp": "accuracy_f1",
    "stsb": "pearson_spearman",
}


@dataclass(frozen=True)
class Metric:
    """A named measure of predictions against references.

    Call it with two arrays of shape (rows,): class ids (integers) for classification, scores (floats) for
    regression. It returns every number of the measure by name, as plain floats.
    """

    name: str
    """What the setting `eval.metric` calls it."""
    primary: str
    """The number among its results that leads: the one to compare runs by, higher or lower as it goes."""
    is_regression: bool
    """Whether it measures scores rather than class ids."""
    compute: Callable[[np.ndarray, np.ndarray], Scores]
    """The measure itself; expects arrays that were checked."""

    def __call__(self, predictions: np.ndarray, references: np.ndarray) -> Scores:
        """Score the predictions.

        Args:
            predictions: class ids or scores, shape (rows,).
            references: the right answers, shape (rows,), rows in the same order.

        Raises:
            ValueError: no rows, shapes that differ, or class ids that are not whole numbers.
        """
        predictions, references = np.asarray(predictions), np.asarray(references)
        self._check(predictions, references)
        return {name: float(value) for name, value in self.compute(predictions, references).items()}

    def renumbered(self, order: Sequence[int]) -> Metric:
        """Return the same measure for class ids of another order: F1 stays that of the same class.

        Args:
            order: this measure's id of each class, shape (classes,).
        """
        ids = np.asarray(order)
        return replace(
            self, compute=lambda predictions, references: self.compute(ids[predictions], ids[references])
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The numbers that it returns, by name."""
        rows = np.arange(2.0 if self.is_regression else 2)
        return tuple(self(rows, rows))

    def _check(self, predictions: np.ndarray, references: np.ndarray) -> None:
        if predictions.ndim != 1 or predictions.shape != references.shape or not len(predictions):
            raise ValueError(
                f"{self.name} got predictions of shape {predictions.shape} and references of shape "
                f"{references.shape}; expected one prediction a row and one reference a row"
            )
        kinds = {predictions.dtype.kind, references.dtype.kind}
        if not self.is_regression and not kinds <= set("iub"):
            raise ValueError(
                f"{self.name} got {predictions.dtype} predictions and {references.dtype} references; "
                "expected class ids (take the argmax of the logits first)"
            )


def get_metric(name: str = "auto", *, is_regression: bool = False, num_labels: int = 2) -> Metric:
    """Return the metric of this name, if it fits the task.

    Args:
        name: one of `METRIC_NAMES`, or `auto`: pearson_spearman for a regression, accuracy otherwise.
        is_regression: whether the task's labels are scores.
        num_labels: classes of the task; ignored for a regression.

    Raises:
        ConfigError: an unknown name, or a metric for another kind of task.
    """
    if name == "auto":
        name = "pearson_spearman" if is_regression else "accuracy"
    refuse_unfit(name, "regression" if is_regression else "classification")
    metric = METRICS[name]
    if name in ("f1", "accuracy_f1") and num_labels != 2:
        raise ConfigError(
            f"eval.metric: {name} is the F1 of class 1 of two, and this task has {num_labels} classes; "
            "use f1_macro or accuracy"
        )
    return metric


def metric_for_task(task_name: str | None, *, is_regression: bool = False) -> str:
    """Name a task's usual metric: GLUE's for a GLUE task, by the kind of task otherwise."""
    usual = TASK_METRICS.get((task_name or "").lower().replace("-", ""))
    if usual is not None and METRICS[usual].is_regression == is_regression:
        return usual
    return "pearson_spearman" if is_regression else "accuracy"


def _accuracy(predictions: np.ndarray, references: np.ndarray) -> Scores:
    return {"accuracy": float(np.mean(predictions == references))}


def _f1(predictions: np.ndarray, references: np.ndarray) -> Scores:
    return {"f1": _sklearn().f1_score(references, predictions, pos_label=1, zero_division=0.0)}


def _f1_macro(predictions: np.ndarray, references: np.ndarray) -> Scores:
    return {"f1_macro": _sklearn().f1_score(references, predictions, average="macro", zero_division=0.0)}


def _accuracy_f1(predictions: np.ndarray, references: np.ndarray) -> Scores:
    return _accuracy(predictions, references) | _f1(predictions, references)


def _matthews_correlation(predictions: np.ndarray, references: np.ndarray) -> Scores:
    # One class only: the coefficient is 0/0, and 0, no better than chance, by convention.
    if len(np.unique(predictions)) == 1 or len(np.unique(references)) == 1:
        return {"matthews_correlation": 0.0}
    return {"matthews_correlation": _sklearn().matthews_corrcoef(references, predictions)}


def _pearson_spearman(predictions: np.ndarray, references: np.ndarray) -> Scores:
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        logger.warning(
            "correlation of constant %s is undefined and reported as 0",
            "predictions" if np.ptp(predictions) == 0 else "references",
        )
        return {"pearson": 0.0, "spearman": 0.0}
    stats = _scipy_stats()
    return {
        "pearson": stats.pearsonr(predictions, references)[0],
        "spearman": stats.spearmanr(predictions, references)[0],
    }


def _mse(predictions: np.ndarray, references: np.ndarray) -> Scores:
    return {"mse": float(np.mean((predictions.astype(np.float64) - references.astype(np.float64)) ** 2))}


def _sklearn() -> Any:
    try:
        import sklearn.metrics
    except ImportError as error:
        raise ConfigError(
            f"eval.metric: needs scikit-learn: pip install 'swaft[metrics]' ({error})"
        ) from error
    return sklearn.metrics


def _scipy_stats() -> Any:
    try:
        import scipy.stats
    except ImportError as error:
        raise ConfigError(f"eval.metric: needs scipy: pip install 'swaft[metrics]' ({error})") from error
    return scipy.stats


def _names(is_regression: bool) -> list[str]:
    return [name for name, metric in METRICS.items() if metric.is_regression == is_regression]


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "accuracy", False, _accuracy),
        Metric("f1", "f1", False, _f1),
        Metric("f1_macro", "f1_macro", False, _f1_macro),
        Metric("accuracy_f1", "accuracy", False, _accuracy_f1),
        Metric("matthews_correlation", "matthews_correlation", False, _matthews_correlation),
        Metric("pearson_spearman", "pearson", True, _pearson_spearman),
        Metric("mse", "mse", True, _mse),
    )
}
METRIC_NAMES = NAMES["classification"] + NAMES["regression"]
