"""The metrics for each kind of task, and those for class ids and scores: arrays in, named numbers out.

Metrics for texts and answers are defined with their evaluation. There is no hub and no download; libraries are
imported when a metric is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from swaft.errors import ConfigError
from swaft.options import suggestion

logger = logging.getLogger(__name__)

Scores = dict[str, float]
"""Numbers by name."""
NAMES = {
    "classification": ("accuracy", "f1", "f1_macro", "accuracy_f1", "matthews_correlation"),
    "regression": ("pearson_spearman", "mse"),
    "generation": ("rouge", "rougeL_coco", "bleu", "chrf", "bleu_chrf", "bleu_rouge"),
    "question answering": ("squad", "squad_v2"),
}
"""Values of the setting `eval.metric`, by kind of task; `auto` works for all."""


PACKAGES = {
    "rouge_score": "rouge-score",
    "sacrebleu": "sacrebleu",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
}
"""The packages that only some metrics need, by import name."""


@dataclass(frozen=True)
class Metric:
    """A named measure of predictions against references."""

    name: str
    """Its name in the setting `eval.metric`."""
    names: tuple[str, ...]
    """The numbers that it returns; the first is the main one, by which runs are compared."""
    compute: Callable[..., Any]
    """The function, called with predictions and references in the same order."""
    is_regression: bool = False
    """Whether it measures scores rather than classes, texts or answers."""
    modules: tuple[str, ...] = ()
    """Modules that it imports when it is computed."""
    lower_is_better: tuple[str, ...] = ()
    """Those of its numbers for which lower is better; for the others higher is."""

    def require_modules(self) -> Metric:
        """Return the metric itself, if everything it imports is installed.

        Raises:
            ConfigError: a package is not installed; names the extra that includes it.
        """
        for module in self.modules:
            library(module)
        return self


def unfit(name: str, *tasks: str) -> str | None:
    """Say that a metric does not exist, or is for a kind of task other than these (of `NAMES`); None: it fits."""
    fitting = [each for task in tasks for each in NAMES[task]]
    if name in fitting:
        return None
    if tasks and any(name in each for each in NAMES.values()):
        return f"{name} does not fit a {' or '.join(tasks)} task; use auto, {' or '.join(fitting)}"
    return f"'{name}' is not one of {', '.join(['auto', *fitting])}.{suggestion(name, fitting)}"


def refuse_unfit(name: str, task: str) -> None:
    """Refuse a metric that does not exist, or is for another kind of task; `auto` has been resolved.

    Raises:
        ConfigError: names the metrics that fit.
    """
    if message := unfit(name, task):
        raise ConfigError(f"eval.metric: {message}")


def library(module: str) -> Any:
    """Import a module that only some metrics need.

    Raises:
        ConfigError: its package is not installed; names the extra that includes it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = PACKAGES[module.split(".")[0]]
        raise ConfigError(f"eval.metric: needs {package}: pip install 'swaft[metrics]' ({error})") from error


TASK_METRICS = {
    "cola": "matthews_correlation",
    "mrpc": "accuracy_f1",
    "qqp": "accuracy_f1",
}
"""The metric that GLUE reports for a task of classes, if it is not accuracy (Wang et al. 2019, table 1)."""


def get_metric(
    name: str = "auto",
    *,
    task_name: str | None = None,
    is_regression: bool = False,
    num_labels: int = 2,
    label_names: Sequence[str] | None = None,
    positive_label: str | None = None,
) -> Metric:
    """Return the metric of this name, if it fits the task.

    The metric compares two arrays of class ids, or of scores, shape (rows,), and returns every number by name.

    Args:
        name: one of `NAMES` for classification or regression, or `auto`: GLUE's for a GLUE task, else
            pearson_spearman for a regression and accuracy for classes.
        task_name: name of the task, for `auto`.
        is_regression: whether the task's labels are scores.
        num_labels: number of classes; ignored for a regression.
        label_names: names of the classes in order of their ids; None: the ids.
        positive_label: of two classes, the name of the one whose F1 is measured; None: the second, which is logged.

    Raises:
        ConfigError: an unknown name, a metric for another kind of task, or a class that does not exist.
    """
    if name == "auto":
        of_classes = TASK_METRICS.get((task_name or "").lower(), "accuracy")
        name = "pearson_spearman" if is_regression else of_classes
    refuse_unfit(name, "regression" if is_regression else "classification")
    metric = METRICS[name].require_modules()
    if "f1" not in metric.names:
        if positive_label is not None:
            raise ConfigError(
                f"data.positive_label is {positive_label}, which eval.metric={name} does not use; remove it, or "
                "set eval.metric=f1 or accuracy_f1"
            )
        return metric
    if num_labels != 2:
        raise ConfigError(
            f"eval.metric: {name} is the F1 of one class of two, but this task has {num_labels} classes; "
            "use f1_macro or accuracy"
        )
    classes = list(label_names or ("0", "1"))
    if positive_label is None:
        positive_label = classes[1]
        logger.info(
            "%s: the positive class is %s, the second of %s; data.positive_label sets another",
            *(name, positive_label, ", ".join(classes)),
        )
    if positive_label not in classes:
        raise ConfigError(
            f"data.positive_label: there is no class '{positive_label}'; expected one of {', '.join(classes)}"
        )
    return metric if positive_label == classes[1] else renumbered(metric, (1, 0))


def renumbered(metric: Metric, order: Sequence[int]) -> Metric:
    """Return the same metric for class ids in another order, so that F1 stays that of the same class.

    Args:
        metric: a metric for class ids.
        order: the metric's id of each class, shape (classes,).
    """
    ids = np.asarray(order)
    return replace(
        metric, compute=lambda predictions, references: metric.compute(ids[predictions], ids[references])
    )


def _accuracy(predictions: np.ndarray, references: np.ndarray) -> Scores:
    return {"accuracy": np.mean(predictions == references).item()}


def _f1(predictions: np.ndarray, references: np.ndarray, name: str = "f1", average: str = "binary") -> Scores:
    f1_score = library("sklearn.metrics").f1_score
    return {name: float(f1_score(references, predictions, average=average, zero_division=0.0))}


def _accuracy_f1(predictions: np.ndarray, references: np.ndarray) -> Scores:
    return _accuracy(predictions, references) | _f1(predictions, references)


def _matthews_correlation(predictions: np.ndarray, references: np.ndarray) -> Scores:
    # With only one class the coefficient is 0/0; by convention it is 0, no better than chance.
    if len(np.unique(predictions)) == 1 or len(np.unique(references)) == 1:
        return {"matthews_correlation": 0.0}
    coefficient = library("sklearn.metrics").matthews_corrcoef
    return {"matthews_correlation": float(coefficient(references, predictions))}


def _pearson_spearman(predictions: np.ndarray, references: np.ndarray) -> Scores:
    for what, values in (("predictions", predictions), ("references", references)):
        if np.ptp(values) == 0:
            logger.warning("correlation of constant %s is undefined and reported as 0", what)
            return {"pearson": 0.0, "spearman": 0.0}
    stats = library("scipy.stats")
    return {
        "pearson": float(stats.pearsonr(predictions, references)[0]),
        "spearman": float(stats.spearmanr(predictions, references)[0]),
    }


def _mse(predictions: np.ndarray, references: np.ndarray) -> Scores:
    difference = predictions.astype(np.float64) - references.astype(np.float64)
    return {"mse": np.mean(difference**2).item()}


SKLEARN, SCIPY = ("sklearn.metrics",), ("scipy.stats",)
METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", ("accuracy",), _accuracy),
        Metric("f1", ("f1",), _f1, modules=SKLEARN),
        Metric("f1_macro", ("f1_macro",), partial(_f1, name="f1_macro", average="macro"), modules=SKLEARN),
        Metric("accuracy_f1", ("accuracy", "f1"), _accuracy_f1, modules=SKLEARN),
        Metric("matthews_correlation", ("matthews_correlation",), _matthews_correlation, modules=SKLEARN),
        Metric("pearson_spearman", ("pearson", "spearman"), _pearson_spearman, True, SCIPY),
        Metric("mse", ("mse",), _mse, is_regression=True, lower_is_better=("mse",)),
    )
}
