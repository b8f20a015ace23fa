"""Scores generated texts against one or more references each: ROUGE, BLEU and chrF, all from 0 to 100."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version

import numpy as np

from swaft.training.metrics.names import Metric, library, refuse_unfit

logger = logging.getLogger(__name__)

TASK_METRICS = {"e2e": "bleu_rouge", "scitldr": "rouge", "tatoeba_en_fr": "bleu_chrf"}
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
RESAMPLES = 1000
"""How often the rows are drawn for the intervals."""
COCO_BETA = 1.2
"""How much more recall weighs than precision in `rougeL_coco`; the value of the COCO caption scripts."""

# A sentence ends at . ! or ?, closing quotes and brackets included, where white space follows and then
# anything but a lower-case letter. A text with line breaks is taken to have one sentence a line already.
SENTENCE_END = re.compile(r"""(?<=[.!?])(["'”’)\]]*)\s+(?=[^\sa-z])""")

# Close to the Penn Treebank tokens of the COCO scripts, whose tokenizer is a Java program.
CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b")
COCO_TOKEN = re.compile(r"n't\b|'(?:s|m|d|re|ve|ll)\b|\w+(?:[-.']\w+|,\d+)*|[^\w\s]")
COCO_DROPPED = frozenset(".,:;?!-…`'\"()[]{}“”‘’–—")

References = Sequence[Sequence[str]]
"""The right texts of each row, one or more."""


@dataclass(frozen=True)
class GenerationScores:
    """Numbers, how sure they are, and how they were computed."""

    scores: dict[str, float]
    """By name, 0 to 100."""
    intervals: dict[str, tuple[float, float]]
    """95 % bootstrap interval over the rows, of the numbers that are means over rows (all but BLEU, chrF)."""
    signatures: dict[str, str]
    """How each number was computed; numbers of different signatures cannot be compared."""


def get_generation_metric(
    name: str = "auto", *, task_name: str | None = None, translates: bool = False
) -> Metric:
    """Return the metric of this name: of generated texts and the right ones of each, to `GenerationScores`.

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
    return METRICS[name].require_modules()


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


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences: its lines where it has several, else after . ! or ? (`SENTENCE_END`).

    There is no list of abbreviations: "Dr. Who" is two sentences, in predictions and references alike.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1:
        return lines
    return SENTENCE_END.sub(r"\1\n", text.strip()).splitlines()


def rouge_l_coco(prediction: str, references: Sequence[str]) -> float:
    """Return ROUGE-L as the COCO caption and E2E challenge scripts compute it, from 0 to 1.

    Precision and recall of the longest common subsequence are each the best over the references, which may
    be two different ones; F weighs recall by `COCO_BETA`. So it is no smaller than ROUGE-L with the best
    reference would be at that beta, and the two must not be compared.

    Source: Lin 2004, as in the COCO caption evaluation (Chen et al. 2015); `coco_tokens` says how the
    tokens differ from theirs.
    """
    candidate = coco_tokens(prediction)
    if not candidate:
        return 0.0
    precision = recall = 0.0
    for reference in map(coco_tokens, references):
        common = longest_common_subsequence(candidate, reference)
        precision = max(precision, common / len(candidate))
        recall = max(recall, common / len(reference) if reference else 0.0)
    if not precision or not recall:
        return 0.0
    return (1 + COCO_BETA**2) * precision * recall / (recall + COCO_BETA**2 * precision)


def rouge_scorer(names: Sequence[str] = ROUGE_TYPES) -> Callable[[str, Sequence[str]], dict[str, float]]:
    """Return what scores a text by Google's rouge-score: F1, 0 to 1, with the best reference for each number.

    rouge-score lower-cases, keeps the letters a to z and digits, and drops the rest, so it suits English and its
    neighbours only. English suffixes are stripped (Porter), as published summarisation results have it. For
    rougeLsum texts are split into sentences by `split_sentences`; rouge-score's own way would download a model.

    Args:
        names: the numbers to compute, of `ROUGE_TYPES`.

    Raises:
        ConfigError: rouge-score is not installed.
    """
    tokenizer = library("rouge_score.tokenizers").DefaultTokenizer(use_stemmer=True)
    # A text is compared with several others, and stemming takes longer than comparing.
    tokenizer.tokenize = lru_cache(maxsize=10_000)(tokenizer.tokenize)
    scorer = library("rouge_score.rouge_scorer").RougeScorer(list(names), tokenizer=tokenizer)

    def score(prediction: str, references: Sequence[str]) -> dict[str, float]:
        lines = ["\n".join(split_sentences(text)) for text in references]
        best = scorer.score_multi(lines, "\n".join(split_sentences(prediction)))
        return {name: float(best[name].fmeasure) for name in names}

    return score


def coco_tokens(text: str) -> list[str]:
    """Split a text as the COCO scripts do, nearly: lower case, contractions apart, punctuation dropped.

    Words keep inner hyphens, points and apostrophes, numbers their commas, and other symbols (£) are tokens.
    """
    split = CONTRACTION.sub(r" \1", text.lower().replace("’", "'"))
    return [token for token in COCO_TOKEN.findall(split) if token not in COCO_DROPPED]


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest sequence of tokens that both hold in this order, gaps allowed."""
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            above = row[column]
            row[column] = diagonal + 1 if token == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]


def _rouge(
    predictions: Sequence[str], references: References, names: Sequence[str] = ROUGE_TYPES
) -> GenerationScores:
    scorer = rouge_scorer(names)
    unreadable = sum(not any(re.search("[a-zA-Z0-9]", text) for text in row) for row in references)
    if unreadable:
        logger.warning(
            "%d of %d rows have no reference with a letter from a to z or a digit; ROUGE sees nothing else and "
            "gives them 0. Use eval.metric=chrf for texts in other scripts",
            *(unreadable, len(references)),
        )
    signature = f"refs:best-f1|stem:porter|sents:swaft|scorer:rouge-score|version:{version('rouge-score')}"
    return _means(list(map(scorer, predictions, references)), signature)


def _rouge_l_coco(predictions: Sequence[str], references: References) -> GenerationScores:
    rows = [{"rougeL_coco": score} for score in map(rouge_l_coco, predictions, references)]
    return _means(rows, f"refs:best-p,best-r|beta:{COCO_BETA}|case:lc|tok:treebank-like|scorer:swaft")


def _means(rows: list[dict[str, float]], signature: str) -> GenerationScores:
    names = list(rows[0])
    values = 100 * np.array([[row[name] for name in names] for row in rows])
    low, high = bootstrap_intervals(values, samples=RESAMPLES, seed=0)
    intervals = {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}
    means = dict(zip(names, map(float, values.mean(axis=0)), strict=True))
    return GenerationScores(means, intervals, dict.fromkeys(names, signature))


def _of_corpus(name: str, predictions: Sequence[str], references: References) -> GenerationScores:
    """Score by sacrebleu: BLEU with WMT's way to split words (13a), chrF; both mind the case, as in WMT."""
    metric = getattr(library("sacrebleu"), name.upper())()
    # sacrebleu wants one list for all first references, one for all second ones, ...: None where a row has fewer.
    most = max(map(len, references))
    columns = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    score = float(metric.corpus_score(list(predictions), columns).score)
    return GenerationScores({name: score}, {}, {name: str(metric.get_signature())})


_bleu, _chrf = partial(_of_corpus, "bleu"), partial(_of_corpus, "chrf")


def _joined(*parts: Callable[..., GenerationScores]) -> Callable[..., GenerationScores]:
    """Return a measure of all the numbers of these."""

    def compute(predictions: Sequence[str], references: References) -> GenerationScores:
        joined = GenerationScores({}, {}, {})
        for part in parts:
            found = part(predictions, references)
            joined.scores.update(found.scores)
            joined.intervals.update(found.intervals)
            joined.signatures.update(found.signatures)
        return joined

    return compute


ROUGE, SACREBLEU = ("rouge_score.tokenizers", "rouge_score.rouge_scorer"), ("sacrebleu",)
METRICS = {
    metric.name: metric
    for metric in (
        Metric("rouge", ("rougeL", "rouge1", "rouge2", "rougeLsum"), _rouge, modules=ROUGE),
        Metric("bleu", ("bleu",), _bleu, modules=SACREBLEU),
        Metric("chrf", ("chrf",), _chrf, modules=SACREBLEU),
        Metric("rougeL_coco", ("rougeL_coco",), _rouge_l_coco),
        Metric("bleu_chrf", ("bleu", "chrf"), _joined(_bleu, _chrf), modules=SACREBLEU),
        # The numbers of the E2E challenge, and ROUGE-L beside its namesake.
        Metric(
            "bleu_rouge",
            ("bleu", "rougeL_coco", "rougeL"),
            _joined(_bleu, _rouge_l_coco, partial(_rouge, names=("rougeL",))),
            modules=(*ROUGE, *SACREBLEU),
        ),
    )
}
