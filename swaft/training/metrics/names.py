"""Which metrics there are for which kind of task, and what they have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from swaft.errors import ConfigError
from swaft.options import suggestion

NAMES = {
    "classification": ("accuracy", "f1", "f1_macro", "accuracy_f1", "matthews_correlation"),
    "regression": ("pearson_spearman", "mse"),
    "generation": ("rouge", "rougeL_coco", "bleu", "chrf", "bleu_chrf", "bleu_rouge"),
    "question answering": ("squad", "squad_v2"),
}
"""What the setting `eval.metric` may say, by kind of task; `auto` besides."""


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

    @property
    def primary(self) -> str:
        """The number that leads."""
        return self.names[0]


def refuse_unfit(name: str, task: str) -> None:
    """Refuse a metric that does not exist, or is for another kind of task.

    Args:
        name: what `eval.metric` says; `auto` has been resolved.
        task: one of the kinds in `NAMES`.

    Raises:
        ConfigError: names the metrics that fit.
    """
    fitting = NAMES[task]
    if name in fitting:
        return
    if any(name in names for names in NAMES.values()):
        raise ConfigError(f"eval.metric: {name} does not fit a {task} task; use auto, {' or '.join(fitting)}")
    raise ConfigError(
        f"eval.metric: '{name}' is not one of auto, {', '.join(fitting)}.{suggestion(name, fitting)}"
    )


def library(module: str, package: str) -> Any:
    """Import a module that only some metrics need.

    Raises:
        ConfigError: the package is not installed; names the extra that brings it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(f"eval.metric: needs {package}: pip install 'swaft[metrics]' ({error})") from error
