"""Scores of predictions, by kind of task: no hub, no download, libraries imported when a metric is used."""

from swaft.training.metrics.classification import (
    METRIC_NAMES,
    METRICS,
    TASK_METRICS,
    Metric,
    Scores,
    get_metric,
    metric_for_task,
)
from swaft.training.metrics.generation import (
    GenerationMetric,
    GenerationOptions,
    GenerationScores,
    get_generation_metric,
)
from swaft.training.metrics.names import NAMES
from swaft.training.metrics.question_answering import (
    QuestionMetric,
    QuestionScores,
    get_question_metric,
    score_squad,
    score_squad_v2,
)

__all__ = [
    "METRICS",
    "METRIC_NAMES",
    "NAMES",
    "TASK_METRICS",
    "GenerationMetric",
    "GenerationOptions",
    "GenerationScores",
    "Metric",
    "QuestionMetric",
    "QuestionScores",
    "Scores",
    "get_generation_metric",
    "get_metric",
    "get_question_metric",
    "metric_for_task",
    "score_squad",
    "score_squad_v2",
]
