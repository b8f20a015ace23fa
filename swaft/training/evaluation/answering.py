"""Finds the answers that a model gives, and scores them: each window once, however many ranks share the work.

The scores follow the official SQuAD 1.1 and 2.0 scripts: exact match and F1, from 0 to 100.
"""

from __future__ import annotations

import logging
import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn
from torch.utils.data import DataLoader

from swaft.errors import ConfigError, TrainingError
from swaft.noise.inputs import task_logits
from swaft.training.data.question_answering import (
    NO_ANSWER_HERE,
    POSITIONS,
    QuestionAnsweringEvalConfig,
    right_answers,
)
from swaft.training.data.texts import values
from swaft.training.evaluation.evaluate import ROW_ID, Evaluation, measured_once, require_finite
from swaft.training.metrics import Metric, refuse_unfit
from swaft.training.run.folder import RunFolder

logger = logging.getLogger(__name__)

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)  # only ASCII, as in the official scripts

Questions = Sequence[tuple[str, Sequence[str]]]
"""(id, right answers) of each question; empty if the question has no answer."""


def get_question_metric(name: str = "auto", *, has_unanswerable: bool = False) -> Metric:
    """Return the metric of this name, if it fits the questions.

    Args:
        name: squad, squad_v2 or `auto`: squad_v2 if some questions have no answer.
        has_unanswerable: whether some questions have no answer.

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
        questions: ids and right answers; at least one question, and one answer for each.

    Source: evaluate-v1.1.py (Rajpurkar et al. 2016), including its corner case: an answer of only articles and
    punctuation is an exact match for another one, but has an F1 of 0.
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

    With null odds, a question whose odds exceed the threshold counts as answered with "none", and
    `best_exact`, `best_f1` are the scores at the best thresholds for these very questions (`..._thresh`, in
    units of the odds): a bound on what a threshold can achieve, not a result.

    Args:
        answers: text by id, empty for "none"; with null odds, the best text even if "none" wins.
        questions: ids and right answers.
        null_odds: by id, how much "none" scores above the best text; higher favours "none". None: the answers are
            final.
        null_score_diff_threshold: as above.

    Source: evaluate-v2.0.py (Rajpurkar et al. 2018), except for three corner cases: a question without a given
    answer scores 0, where the script leaves it out of one mean and crashes in another; questions with equal null
    odds are on the same side of a threshold; and an answer without words is "none" for the best threshold
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
    """Lowercase a text and drop ASCII punctuation, articles (a, an, the) and extra white space."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split())


def exact_match(answer: str, right: str) -> float:
    """Return 1.0 if both texts are the same after normalisation, else 0.0."""
    return float(normalize_answer(answer) == normalize_answer(right))


def token_f1(answer: str, right: str) -> float:
    """Return the F1 of the words of both texts after normalisation; 0.0 if one has none (SQuAD 1.1)."""
    first, second = normalize_answer(answer).split(), normalize_answer(right).split()
    common = sum((Counter(first) & Counter(second)).values())
    if not common:
        return 0.0
    precision, recall = common / len(first), common / len(second)
    return 2 * precision * recall / (precision + recall)


def token_f1_v2(answer: str, right: str) -> float:
    """Return `token_f1`, but 1.0 if neither text has words: both mean "none" (SQuAD 2.0)."""
    if not normalize_answer(answer) and not normalize_answer(right):
        return 1.0
    return token_f1(answer, right)


def _best_v2(answer: str, right: Sequence[str]) -> tuple[float, float]:
    # A right answer without words is indistinguishable from "none", so the official script drops it.
    texts = [one for one in right if normalize_answer(one)] or [""]
    return max(exact_match(answer, one) for one in texts), max(token_f1_v2(answer, one) for one in texts)


def _means(pairs: Mapping[str, tuple[float, float]], questions: Iterable[str]) -> dict[str, float]:
    rows = np.array([pairs.get(question, (0.0, 0.0)) for question in questions])
    exact, f1 = 100 * rows.mean(axis=0)
    return {"exact": float(exact), "f1": float(f1)}


def _best_threshold(gains: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Return the largest sum of gains over the questions up to some null odds, and those odds.

    Args:
        gains: (null odds, what answering the question adds to the sum of scores).
    """
    total = 0.0
    up_to: dict[float, float] = {}  # questions with equal odds go together
    for odds, gain in sorted(gains):
        total += gain
        up_to[odds] = total
    # Below the lowest odds: no question is answered.
    best, threshold = 0.0, float(np.nextafter(min(up_to), -math.inf)) if up_to else 0.0
    for odds, total in up_to.items():
        if total > best:
            best, threshold = total, float(odds)
    return best, threshold


SQUAD_V2_SCORES = ("f1", "exact", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1")
"""Without the scores at the best thresholds, which are no results."""
METRICS = {
    "squad": Metric("squad", ("f1", "exact_match"), score_squad),
    "squad_v2": Metric("squad_v2", SQUAD_V2_SCORES, score_squad_v2),
}


@dataclass(frozen=True, kw_only=True)
class AnswerSearch:
    """How to find answers from the scores of tokens."""

    has_unanswerable: bool
    """Whether "none" is an answer."""
    max_answer_length: int = 30
    """Longest answer in tokens."""
    null_score_diff_threshold: float = 0.0
    """Null odds above which the answer is "none"."""
    padding_side: Literal["left", "right"] = "right"
    """On which side windows are padded."""


@dataclass(frozen=True)
class Answers:
    """The model's answers, by id of the question."""

    texts: dict[str, str]
    """The answers: characters of the context, without surrounding white space; empty if "none" wins."""
    best_texts: dict[str, str]
    """The best texts, even if "none" wins; `score_squad_v2` takes these, with the null odds."""
    null_odds: dict[str, float]
    """How much "none" scores above the best text; empty unless questions may have no answer."""


def evaluate_answers(
    model: nn.Module,
    loader: DataLoader[Any],
    accelerator: Accelerator,
    *,
    questions: Dataset,
    windows: Dataset,
    metric: Metric,
    search: AnswerSearch,
) -> Evaluation:
    """Return the loss per window and the scores of the answers to a set of questions (collective).

    The ``loss`` is the mean over windows, in float64, of the average of the cross entropies of the first and the
    last token, over the window's own tokens: it depends neither on batch size nor on ranks. The model's own loss,
    used in training, also counts the padding a little, and so does this one if there is no mask (FNet).

    Args:
        model: the prepared model; its training mode is restored.
        loader: prepared loader of batches of windows, from `Collator`.
        accelerator: the one that prepared both.
        questions: rows that `check_questions` checked.
        windows: from `tokenize_questions` on the same rows, with ``training=False``.
        metric: scores answers against right ones.
        search: how to find answers.

    Raises:
        TrainingError: windows are missing, or the loss is not finite; on every rank.
    """

    def measure(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        inputs = {name: value for name, value in batch.items() if name not in (*POSITIONS, ROW_ID)}
        logits = task_logits(model(**inputs)).float()  # (B, 2, L)
        targets = torch.stack([batch[name] for name in POSITIONS], dim=1)
        counted = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))  # FNet has no mask
        padding = (counted == 0).unsqueeze(1)
        losses = nn.functional.cross_entropy(
            logits.double().masked_fill(padding, -torch.inf).transpose(1, 2), targets, reduction="none"
        )
        room = longest - logits.shape[-1]  # below 0 if the batch has more padding than it needs
        sides = (room, 0) if search.padding_side == "left" else (0, room)
        return losses.mean(dim=1), nn.functional.pad(logits, sides)

    longest = max(map(len, windows["input_ids"][:]))
    losses, logits = measured_once(model, loader, accelerator, measure, num_rows=len(windows))
    loss = require_finite(losses.mean().item())
    # Every rank computes the scores, so that every rank has them, or the error, without communication.
    found, right = find_answers(questions, windows, list(logits.numpy()), search), right_answers(questions)
    if search.has_unanswerable:
        threshold = search.null_score_diff_threshold
        scored = metric.compute(found.best_texts, right, found.null_odds, null_score_diff_threshold=threshold)
    else:
        scored = metric.compute(found.texts, right)
    return Evaluation(
        scores={**scored, "loss": loss},
        details={"metric": metric.name, "questions": len(questions), "windows": len(windows)},
        outputs=[found.texts[question] for question in questions["id"]],
    )


def find_answers(
    questions: Dataset, windows: Dataset, logits: Sequence[np.ndarray], search: AnswerSearch
) -> Answers:
    """Find the best answer to every question.

    All spans of up to `max_answer_length` tokens are compared, not only those between the best first and the
    best last tokens. The score of "none" is the lowest CLS score over the windows: there the model sees an answer,
    if anywhere. If scores tie, the answer that starts first wins, then the shorter one.

    Args:
        questions: their rows.
        windows: from `tokenize_questions` on the same rows, with ``training=False``.
        logits: for each window, in order, the scores of its tokens as the first and as the last of an answer, shape
            (2, L); longer than the window if it was padded.
        search: how to find them.

    Raises:
        TrainingError: logits are not finite.
    """
    # The score of each question's best span, negated, and its characters in the context.
    best = [(math.inf, 0, 0)] * len(questions)
    null_scores = [math.inf] * len(questions)
    columns = zip(values(windows, "row", "cls_position", "offsets"), logits, strict=True)
    for window, ((row, cls, listed), scores) in enumerate(columns):
        offsets = np.asarray(listed)
        begin = 0 if search.padding_side == "right" else len(scores[0]) - len(offsets)
        start, end = np.asarray(scores, dtype=np.float64)[:, begin : begin + len(offsets)]
        if not np.isfinite(start + end).all():
            raise TrainingError(
                f"the logits of window {window} are not finite; lower train.learning_rate, or train with "
                "train.mixed_precision=bf16 rather than fp16"
            )
        null_scores[row] = min(null_scores[row], float(start[cls] + end[cls]))
        best[row] = min(best[row], _best_span(start, end, offsets, search.max_answer_length))
    answers = Answers({}, {}, {})
    rows = zip(values(questions, "id", "context"), best, null_scores, strict=True)
    for (question, context), (cost, first, last), null_score in rows:
        text = context[first:last].strip()
        answers.best_texts[question] = answers.texts[question] = text
        if search.has_unanswerable:
            odds = answers.null_odds[question] = null_score + cost
            answers.texts[question] = "" if odds > search.null_score_diff_threshold else text
    return answers


def refuse_unused_threshold(settings: QuestionAnsweringEvalConfig, *, has_unanswerable: bool) -> None:
    """Refuse a null score threshold if every question has an answer."""
    threshold = settings.null_score_diff_threshold
    if threshold and not has_unanswerable:
        raise ConfigError(
            f"eval.null_score_diff_threshold is {threshold}, but every question has an answer; remove it, or set "
            "data.version_2_with_negative=true if questions may have none"
        )


def refuse_score_of_no_question(settings: QuestionAnsweringEvalConfig, splits: Mapping[str, Dataset]) -> None:
    """Refuse to choose weights by a score of questions (HasAns, NoAns) of which validation has none."""
    chosen, rows = settings.metric_for_best_model or "", splits.get("validation")
    kind = chosen.partition("_")[0]
    if rows is None or kind not in ("HasAns", "NoAns"):
        return
    if all(bool(answers["text"]) != (kind == "HasAns") for answers in values(rows, "answers")):
        how_many = "no" if kind == "HasAns" else "every"
        raise ConfigError(
            f"eval.metric_for_best_model is {chosen}, but {how_many} validation question has an answer; choose "
            "another score, f1 for instance"
        )


def report_windows(splits: Mapping[str, Dataset], windows: Mapping[str, Dataset]) -> None:
    """Log how many windows the contexts of the questions were cut into."""
    for name, rows in windows.items():
        logger.info("%s: %d questions in %d windows", name, len(splits[name]), len(rows))


def write_predictions(
    folder: RunFolder, evaluations: Mapping[str, Mapping[str, Evaluation]], splits: Mapping[str, Dataset]
) -> None:
    """Write the answers to all questions in the format of the official SQuAD scripts: text by id.

    The files are ``predictions-<split>.json`` for the last and ``predictions-<split>-averaged.json`` for the
    averaged weights.
    """
    for split, kinds in evaluations.items():
        for kind, evaluation in kinds.items():
            name = f"predictions-{split}" if kind == "last" else f"predictions-{split}-{kind}"
            answers = dict(zip(splits[split]["id"], evaluation.outputs, strict=True))
            folder.write_json(f"{name}.json", answers)


def _best_span(
    start: np.ndarray, end: np.ndarray, offsets: np.ndarray, max_answer_length: int
) -> tuple[float, int, int]:
    """Return the negated score of the best span, and its characters; infinity if there is none."""
    allowed = offsets[:, 0] != NO_ANSWER_HERE
    if not allowed.any():
        return math.inf, 0, 0
    width = min(max_answer_length, len(allowed))
    ends = np.append(np.where(allowed, end, -np.inf), np.full(width - 1, -np.inf))
    # Entry [i, k]: the span from token i to token i + k.
    scores = np.where(allowed, start, -np.inf)[:, None] + sliding_window_view(ends, width)
    spans = np.argwhere(scores == scores.max())
    first, last = min((int(offsets[i, 0]), int(offsets[i + k, 1])) for i, k in spans)
    return -float(scores.max()), first, last
