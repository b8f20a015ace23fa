"""Which metrics there are for which kind of task, and what they have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from swaft.errors import ConfigError
from swaft.options import suggestion

Scores = dict[str, float]
"""Numbers by name."""
NAMES = {
    "classification": ("accuracy", "f1", "f1_macro", "accuracy_f1", "matthews_correlation"),
    "regression": ("pearson_spearman", "mse"),
    "generation": ("rouge", "rougeL_coco", "bleu", "chrf", "bleu_chrf", "bleu_rouge"),
    "question answering": ("squad", "squad_v2"),
}
"""What the setting `eval.metric` may say, by kind of task; `auto` besides."""


PACKAGES = {
    "rouge_score": "rouge-score",
    "sacrebleu": "sacrebleu",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
}
"""The packages that only some metrics need, by what they are imported as."""


@dataclass(frozen=True)
class Metric:
    """A named measure of predictions against references."""

    name: str
    """What the setting `eval.metric` calls it."""
    names: tuple[str, ...]
    """The numbers that it returns; the first leads, and is the one to compare runs by."""
    compute: Callable[..., Any]
    """The measure itself, of predictions and references in the same order."""
    is_regression: bool = False
    """Whether it measures scores rather than classes, texts or answers."""
    modules: tuple[str, ...] = ()
    """What it imports when it is computed."""

    @property
    def primary(self) -> str:
        """The number that leads."""
        return self.names[0]

    def require_modules(self) -> Metric:
        """Return the metric itself, if all that it imports is there.

        Raises:
            ConfigError: a package is not installed; names the extra that brings it.
        """
        for module in self.modules:
            library(module)
        return self


def unfit(name: str, *tasks: str) -> str | None:
    """Say that a metric does not exist, or is for another kind of task than these (of `NAMES`); None: it fits."""
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
        ConfigError: its package is not installed; names the extra that brings it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = PACKAGES[module.split(".")[0]]
        raise ConfigError(f"eval.metric: needs {package}: pip install 'swaft[metrics]' ({error})") from error
