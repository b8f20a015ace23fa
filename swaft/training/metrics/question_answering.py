"""Scores answers to questions as the official SQuAD 1.1 and 2.0 scripts do: exact match and F1, from 0 to 100."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from swaft.errors import ConfigError
from swaft.training.metrics.names import Metric, refuse_unfit

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII alone, as in the official scripts

Questions = Sequence[tuple[str, Sequence[str]]]
"""(id, right answers) of each question; no answers: the question has none."""


def get_question_metric(name: str = "auto", *, has_unanswerable: bool = False) -> Metric:
    """Return the metric of this name, if it fits the questions.

    Args:
        name: squad, squad_v2 or `auto`: squad_v2 where some questions have no answer.
        has_unanswerable: whether some have none.

    Raises:
        ConfigError: an unknown name, or a metric for another kind of task.
    """
    if name == "auto":
        name = "squad_v2" if has_unanswerable else "squad"
    refuse_unfit(name, "question answering")
    if name == "squad" and has_unanswerable:
        raise ConfigError(
            "eval.metric: squad cannot score questions that have no answer; use squad_v2 or auto"
        )
    return METRICS[name]


def score_squad(answers: Mapping[str, str], questions: Questions) -> dict[str, float]:
    """Return `exact_match` and `f1`, the best over each question's right answers (SQuAD 1.1).

    Args:
        answers: text by id; a question without one scores 0.
        questions: ids and right answers, one at least of each.

    Source: evaluate-v1.1.py (Rajpurkar et al. 2016), its corner kept: an answer of nothing but articles
    and punctuation matches its like exactly, and yet has an F1 of 0.
    """
    given = [(answers[question], right) for question, right in questions if question in answers]
    exact = sum(max(exact_match(answer, one) for one in right) for answer, right in given)
    f1 = sum(max(token_f1(answer, one) for one in right) for answer, right in given)
    return {"exact_match": 100 * exact / len(questions), "f1": 100 * f1 / len(questions)}


def score_squad_v2(
    answers: Mapping[str, str],
    questions: Questions,
    null_odds: Mapping[str, float] | None = None,
    *,
    null_score_diff_threshold: float = 0.0,
) -> dict[str, float]:
    """Return `exact` and `f1` over all questions and over those with (HasAns) and without (NoAns) an answer.

    With null odds the answer of a question whose odds exceed the threshold counts as "none", and
    `best_exact`, `best_f1` are the scores at the thresholds that suit these very questions best (`..._thresh`, in
    units of the odds): a bound on what a threshold can do, no result.

    Args:
        answers: text by id, empty for "none"; with null odds the best text even where "none" wins.
        questions: ids and right answers.
        null_odds: by id, how much "none" scores above the best text; higher is surer of "none". None: the
            answers are final.
        null_score_diff_threshold: as above.

    Source: evaluate-v2.0.py (Rajpurkar et al. 2018), but for three corners: a question without a given answer
    scores 0 instead of being left out of one mean and ending the script in another; questions of equal null
    odds go to the same side of a threshold; and an answer without words is "none" for the best threshold
    too.
    """
    raw = {
        question: _best_v2(answers[question], right) for question, right in questions if question in answers
    }
    has_answer = {question: bool(right) for question, right in questions}
    final = dict(raw)
    if null_odds is not None:
        for question in raw:
            if null_odds[question] > null_score_diff_threshold:
                final[question] = (0.0, 0.0) if has_answer[question] else (1.0, 1.0)
    scores = _means(final, has_answer)
    for prefix, kind in (("HasAns", True), ("NoAns", False)):
        chosen = [question for question, has in has_answer.items() if has is kind]
        if chosen:
            scores |= {f"{prefix}_{name}": value for name, value in _means(final, chosen).items()}
    if null_odds is not None:
        silence = sum(not has_answer[question] for question in raw)
        for column, name in enumerate(("exact", "f1")):
            gains = [(null_odds[each], pair[column] - (not has_answer[each])) for each, pair in raw.items()]
            best, threshold = _best_threshold(gains)
            scores[f"best_{name}"] = 100 * (silence + best) / len(questions)
            scores[f"best_{name}_thresh"] = threshold
    return scores


def normalize_answer(text: str) -> str:
    """Lower-case a text and drop ASCII punctuation, articles (a, an, the) and needless white space."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split())


def exact_match(answer: str, right: str) -> float:
    """Return 1.0 where both texts are the same once normalised, else 0.0."""
    return float(normalize_answer(answer) == normalize_answer(right))


def token_f1(answer: str, right: str) -> float:
    """Return the F1 of the words of both texts once normalised; 0.0 where one has none (SQuAD 1.1)."""
    first, second = normalize_answer(answer).split(), normalize_answer(right).split()
    common = sum((Counter(first) & Counter(second)).values())
    if not common:
        return 0.0
    precision, recall = common / len(first), common / len(second)
    return 2 * precision * recall / (precision + recall)


def token_f1_v2(answer: str, right: str) -> float:
    """Return `token_f1`, but 1.0 where both texts have no words: both say "none" (SQuAD 2.0)."""
    if not normalize_answer(answer) and not normalize_answer(right):
        return 1.0
    return token_f1(answer, right)


def _best_v2(answer: str, right: Sequence[str]) -> tuple[float, float]:
    # A right answer without words cannot be told from "none", so the official script drops it.
    texts = [one for one in right if normalize_answer(one)] or [""]
    return max(exact_match(answer, one) for one in texts), max(token_f1_v2(answer, one) for one in texts)


def _means(pairs: Mapping[str, tuple[float, float]], questions: Iterable[str]) -> dict[str, float]:
    rows = np.array([pairs.get(question, (0.0, 0.0)) for question in questions])
    exact, f1 = 100 * rows.mean(axis=0)
    return {"exact": float(exact), "f1": float(f1)}


def _best_threshold(gains: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Return the largest sum of gains of the questions up to some odds, and those odds.

    Args:
        gains: (null odds, what answering the question adds to the sum of scores).
    """
    total = 0.0
    up_to: dict[float, float] = {}  # questions of equal odds go together
    for odds, gain in sorted(gains):
        total += gain
        up_to[odds] = total
    # Below the lowest odds: no question is answered.
    best, threshold = 0.0, float(np.nextafter(min(up_to), -math.inf)) if up_to else 0.0
    for odds, total in up_to.items():
        if total > best:
            best, threshold = total, float(odds)
    return best, threshold


METRICS = {
    "squad": Metric("squad", ("f1", "exact_match"), score_squad),
    "squad_v2": Metric("squad_v2", ("f1", "exact", "HasAns_exact", "HasAns_f1"), score_squad_v2),
}
