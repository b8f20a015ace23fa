"""Scores generated texts against one or more references each: ROUGE, BLEU and chrF, all from 0 to 100."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from swaft.errors import ConfigError, DataError
from swaft.training.metrics.names import Measure, library, refuse_unfit
from swaft.training.metrics.rouge import (
    ROUGE_TYPES,
    coco_signature,
    rouge_l_coco,
    rouge_scorer,
    rouge_signature,
)

logger = logging.getLogger(__name__)

TASK_METRICS = {"e2e": "bleu_rouge", "scitldr": "rouge", "tatoeba_en_fr": "bleu_chrf"}

BLEU_TOKENIZERS = ("13a", "intl", "char", "zh", "none")
"""Tokenizers of sacrebleu that need no download and no further package."""


@dataclass(frozen=True)
class GenerationOptions:
    """What a result depends on besides the texts; every choice is said in the signatures."""

    use_stemmer: bool = True
    """Strip English suffixes before comparing (rouge); on, as published summarisation results have it."""
    bleu_tokenize: str = "13a"
    """How BLEU splits words, one of `BLEU_TOKENIZERS`; 13a is WMT's."""
    lowercase: bool = False
    """Ignore case in BLEU and chrF. Off, as in WMT."""
    bootstrap_samples: int = 1000
    """Resamples of the rows for the intervals; 0: no intervals."""
    seed: int = 0
    """Seed of those resamples."""


@dataclass(frozen=True)
class GenerationScores:
    """Numbers, how sure they are, and how they were computed."""

    scores: dict[str, float]
    """By name, 0 to 100."""
    intervals: dict[str, tuple[float, float]]
    """95 % bootstrap interval over the rows, of the numbers that are means over rows (all but BLEU, chrF)."""
    signatures: dict[str, str]
    """How each number was computed; numbers of different signatures cannot be compared."""


@dataclass(frozen=True)
class GenerationMetric(Measure):
    """A measure of generated texts; higher is better for all of its numbers."""

    def __call__(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        options: GenerationOptions | None = None,
    ) -> GenerationScores:
        """Score the predictions.

        Args:
            predictions: one text a row; an empty one counts, and scores nothing.
            references: the right texts of each row, one or more, rows in the same order.
            options: None: the defaults.

        Raises:
            ValueError: no rows, counts that differ, or references that are no lists.
            DataError: a row without a reference, or with an empty one.
            ConfigError: an option that sacrebleu cannot follow here, or a library that is missing.
        """
        _check(self.name, predictions, references)
        return self.compute(predictions, references, options or GenerationOptions())


def get_generation_metric(
    name: str = "auto", *, task_name: str | None = None, translates: bool = False
) -> GenerationMetric:
    """Return the metric of this name.

    Args:
        name: one of `NAMES["generation"]`, or `auto`: the usual one of the task, bleu_chrf for other translations,
            rouge for the rest.
        task_name: name of the task, for `auto`.
        translates: whether texts are translated, for `auto`.

    Raises:
        ConfigError: an unknown name, or a metric for another kind of task.
    """
    if name == "auto":
        name = TASK_METRICS.get(task_name or "", "bleu_chrf" if translates else "rouge")
    refuse_unfit(name, "generation")
    return METRICS[name]


def bootstrap_intervals(values: np.ndarray, *, samples: int, seed: int) -> np.ndarray:
    """Return the central 95 % of the means of rows drawn with replacement, shape (2, K): low, high.

    Args:
        values: shape (rows, K); the K numbers of a row are drawn together.
        samples: how often the rows are drawn.
        seed: of the draws; the same seed and rows give the same interval.
    """
    generator = np.random.default_rng(seed)
    rows = len(values)
    means = np.stack([values[generator.integers(rows, size=rows)].mean(axis=0) for _ in range(samples)])
    return np.percentile(means, (2.5, 97.5), axis=0)


def _rouge(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    options: GenerationOptions,
    names: Sequence[str] = ROUGE_TYPES,
) -> GenerationScores:
    scorer = rouge_scorer(names, use_stemmer=options.use_stemmer)
    unreadable = sum(not any(re.search("[a-zA-Z0-9]", text) for text in row) for row in references)
    if unreadable:
        logger.warning(
            "%d of %d rows have no reference with a letter from a to z or a digit; ROUGE sees nothing else and "
            "gives them 0. Use eval.metric=chrf for texts in other scripts",
            unreadable,
            len(references),
        )
    rows = [scorer(prediction, texts) for prediction, texts in zip(predictions, references, strict=True)]
    return _means(rows, rouge_signature(use_stemmer=options.use_stemmer), options)


def _rouge_l_coco(
    predictions: Sequence[str], references: Sequence[Sequence[str]], options: GenerationOptions
) -> GenerationScores:
    pairs = zip(predictions, references, strict=True)
    rows = [{"rougeL_coco": rouge_l_coco(prediction, texts)} for prediction, texts in pairs]
    return _means(rows, coco_signature(), options)


def _bleu(
    predictions: Sequence[str], references: Sequence[Sequence[str]], options: GenerationOptions
) -> GenerationScores:
    if options.bleu_tokenize not in BLEU_TOKENIZERS:
        raise ConfigError(
            f"bleu_tokenize is '{options.bleu_tokenize}'; expected one of {', '.join(BLEU_TOKENIZERS)}, the "
            "tokenizers of sacrebleu that need no download"
        )
    metric = library("sacrebleu", "sacrebleu").BLEU(
        tokenize=options.bleu_tokenize, lowercase=options.lowercase
    )
    return _of_corpus("bleu", metric, predictions, references)


def _chrf(
    predictions: Sequence[str], references: Sequence[Sequence[str]], options: GenerationOptions
) -> GenerationScores:
    metric = library("sacrebleu", "sacrebleu").CHRF(lowercase=options.lowercase)
    return _of_corpus("chrf", metric, predictions, references)


def _means(rows: list[dict[str, float]], signature: str, options: GenerationOptions) -> GenerationScores:
    names = list(rows[0])
    values = 100 * np.array([[row[name] for name in names] for row in rows])
    intervals = {}
    if options.bootstrap_samples:
        low, high = bootstrap_intervals(values, samples=options.bootstrap_samples, seed=options.seed)
        intervals = {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}
    means = dict(zip(names, map(float, values.mean(axis=0)), strict=True))
    return GenerationScores(means, intervals, dict.fromkeys(names, signature))


def _of_corpus(
    name: str, metric: Any, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> GenerationScores:
    # sacrebleu wants one list for all first references, one for all second ones, ...: None where a row has fewer.
    most = max(map(len, references))
    columns = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    score = float(metric.corpus_score(list(predictions), columns).score)
    return GenerationScores({name: score}, {}, {name: str(metric.get_signature())})


def _check(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not len(predictions) or len(predictions) != len(references):
        raise ValueError(
            f"{name} got {len(predictions)} predictions and references for {len(references)} rows; expected one "
            "prediction a row, and one row at least"
        )
    for row, texts in enumerate(references):
        if isinstance(texts, str):
            raise ValueError(f"{name} got a text as the references of row {row}; expected a list of texts")
        if not len(texts) or not all(text.strip() for text in texts):
            found = "an empty reference" if len(texts) else "no reference"
            raise DataError(f"row {row} has {found}, so it cannot be scored; remove the row or fill it in")


def _joined(*parts: Callable[..., GenerationScores]) -> Callable[..., GenerationScores]:
    """Return a measure of all the numbers of these."""

    def compute(
        predictions: Sequence[str], references: Sequence[Sequence[str]], options: GenerationOptions
    ) -> GenerationScores:
        joined = GenerationScores({}, {}, {})
        for part in parts:
            found = part(predictions, references, options)
            joined.scores.update(found.scores)
            joined.intervals.update(found.intervals)
            joined.signatures.update(found.signatures)
        return joined

    return compute


METRICS = {
    metric.name: metric
    for metric in (
        GenerationMetric("rouge", ("rougeL", "rouge1", "rouge2", "rougeLsum"), _rouge),
        GenerationMetric("bleu", ("bleu",), _bleu),
        GenerationMetric("chrf", ("chrf",), _chrf),
        GenerationMetric("rougeL_coco", ("rougeL_coco",), _rouge_l_coco),
        GenerationMetric("bleu_chrf", ("bleu", "chrf"), _joined(_bleu, _chrf)),
        # The numbers of the E2E challenge, and ROUGE-L beside its namesake.
        GenerationMetric(
            "bleu_rouge",
            ("bleu", "rougeL_coco", "rougeL"),
            _joined(_bleu, _rouge_l_coco, partial(_rouge, names=("rougeL",))),
        ),
    )
}
