"""Finds the answers that a model gives, and scores them: each window once, however many ranks share the work."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn
from torch.utils.data import DataLoader

from swaft.errors import ConfigError, DataError, TrainingError
from swaft.noise.outputs import task_logits
from swaft.training.config import QuestionAnsweringEvalConfig
from swaft.training.data.checks import values
from swaft.training.data.question_answering import NO_ANSWER_HERE, POSITIONS, right_answers
from swaft.training.evaluation.evaluate import ROW_ID, Evaluation, each_row_once, require_finite
from swaft.training.metrics.names import Measure
from swaft.training.metrics.question_answering import QuestionScores, score_squad, score_squad_v2
from swaft.training.run.folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """One answer that a question might have."""

    text: str
    """Characters of the context, without white space around them; empty for "none"."""
    score: float
    """Sum of the logits of its first and its last token."""
    probability: float
    """Softmax of the scores over the question's candidates."""
    start: int
    """First character in the context; -1 for "none"."""
    end: int
    """One past its last character; -1 for "none"."""


@dataclass(frozen=True)
class Answers:
    """What the model answers, by id of the question."""

    texts: dict[str, str]
    """The answers: empty where "none" wins."""
    best_texts: dict[str, str]
    """The best texts, also where "none" wins; `score_squad_v2` takes these, with the null odds."""
    n_best: dict[str, list[Candidate]]
    """Candidates, best first."""
    null_odds: dict[str, float]
    """How much "none" scores above the best text; empty unless questions may have no answer."""


def find_answers(
    split: Dataset,
    windows: Dataset,
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    *,
    has_unanswerable: bool,
    n_best_size: int = 20,
    max_answer_length: int = 30,
    null_score_diff_threshold: float = 0.0,
    padding_side: Literal["left", "right"] = "right",
) -> Answers:
    """Find the best answers to every question.

    All spans of up to `max_answer_length` tokens are compared, not only those between the best first and the
    best last tokens. A span that several windows hold counts once, by its best score. "None" scores what
    the CLS token scores in the window where that is least: there the model sees an answer, if anywhere. Of
    equal scores the answer that begins first wins, then the shorter one.

    Args:
        split: rows of the questions.
        windows: from `tokenize_questions` of the same rows, not for training.
        start_logits: for each window, in order, the scores of its tokens, shape (L,); longer than the window
            where it was padded.
        end_logits: as above, for last tokens.
        has_unanswerable: whether "none" is an answer.
        n_best_size: candidates kept for a question; "none" comes on top.
        max_answer_length: tokens of an answer at most.
        null_score_diff_threshold: null odds above which the answer is "none".
        padding_side: where the padding stands.

    Raises:
        ValueError: logits that do not fit the windows.
        TrainingError: logits that are not finite.
        DataError: a question without a window.
    """
    if not len(windows) == len(start_logits) == len(end_logits):
        raise ValueError(
            f"got {len(start_logits)} rows of start logits and {len(end_logits)} of end logits; expected "
            f"{len(windows)}, one a window"
        )
    spans: list[dict[tuple[int, int], float]] = [{} for _ in range(len(split))]
    null_scores = [math.inf] * len(split)
    for window, (row, cls, listed) in enumerate(
        zip(values(windows, "row"), values(windows, "cls_position"), values(windows, "offsets"), strict=True)
    ):
        offsets = np.asarray(listed)
        start = _own(start_logits[window], len(offsets), padding_side, window)
        end = _own(end_logits[window], len(offsets), padding_side, window)
        null_scores[row] = min(null_scores[row], float(start[cls] + end[cls]))
        for first, last, score in _best_spans(start, end, offsets, max_answer_length, n_best_size):
            place = int(offsets[first, 0]), int(offsets[last, 1])
            spans[row][place] = max(score, spans[row].get(place, -math.inf))

    answers = Answers({}, {}, {}, {})
    for row, (question, context) in enumerate(
        zip(values(split, "id"), values(split, "context"), strict=True)
    ):
        if not spans[row]:
            raise DataError(
                f"question {question} has no window with tokens of its context; tokenize this split"
            )
        best = sorted(spans[row].items(), key=lambda item: (-item[1], item[0]))[:n_best_size]
        null = null_scores[row] if has_unanswerable else None
        answers.n_best[question] = _candidates(best, null, context)
        text = _text(context, best[0][0])
        answers.best_texts[question] = answers.texts[question] = text
        if null is not None:
            odds = null - best[0][1]
            answers.null_odds[question] = odds
            answers.texts[question] = "" if odds > null_score_diff_threshold else text
    return answers


def _best_spans(
    start: np.ndarray, end: np.ndarray, offsets: np.ndarray, max_answer_length: int, count: int
) -> list[tuple[int, int, float]]:
    """Return (first token, last token, score) of the best spans, best first, ties in order of their tokens."""
    allowed = offsets[:, 0] != NO_ANSWER_HERE
    if not allowed.any():
        return []
    width = min(max_answer_length, len(allowed))
    ends = np.append(np.where(allowed, end, -np.inf), np.full(width - 1, -np.inf))
    # Entry [i, k]: the span from token i to token i + k.
    scores = (np.where(allowed, start, -np.inf)[:, None] + sliding_window_view(ends, width)).ravel()
    count = min(count, int(np.isfinite(scores).sum()))
    least = np.partition(scores, -count)[-count]
    chosen = np.flatnonzero(scores >= least)
    chosen = chosen[np.argsort(-scores[chosen], kind="stable")][:count]
    return [(int(i // width), int(i // width + i % width), float(scores[i])) for i in chosen]


def _own(logits: np.ndarray, length: int, padding_side: str, window: int) -> np.ndarray:
    """Return the scores of the window's own tokens in float64."""
    if np.ndim(logits) != 1 or len(logits) < length:
        raise ValueError(
            f"window {window} has logits of shape {np.shape(logits)}; expected one for each of {length}"
        )
    own = np.asarray(logits, dtype=np.float64)
    own = own[:length] if padding_side == "right" else own[len(own) - length :]
    if not np.isfinite(own).all():
        raise TrainingError(
            f"the logits of window {window} are not finite; lower train.learning_rate, or train with "
            "train.mixed_precision=bf16 rather than fp16"
        )
    return own


def _candidates(
    best: list[tuple[tuple[int, int], float]], null_score: float | None, context: str
) -> list[Candidate]:
    found = [(_text(context, place), score, *place) for place, score in best]
    if null_score is not None:
        found.append(("", null_score, -1, -1))
        found.sort(key=lambda candidate: -candidate[1])  # stable: a text before "none" of the same score
    weights = np.exp(np.array([score for _, score, _, _ in found]) - found[0][1])
    return [
        Candidate(text, score, float(weight), start, end)
        for (text, score, start, end), weight in zip(found, weights / weights.sum(), strict=True)
    ]


def _text(context: str, place: tuple[int, int]) -> str:
    return context[place[0] : place[1]].strip()


Side = Literal["left", "right"]


@torch.no_grad()
def evaluate_answers(
    model: nn.Module,
    loader: DataLoader[Any],
    accelerator: Accelerator,
    *,
    questions: Dataset,
    windows: Dataset,
    padding_side: Side,
    metric: Measure,
    has_unanswerable: bool,
    settings: QuestionAnsweringEvalConfig,
) -> Evaluation:
    """Return the loss a window and the scores of the answers to a set of questions (collective).

    The ``loss`` is the mean over windows, in float64, of half the cross entropies of the first and the last token,
    over the window's own tokens: it depends neither on batch size nor on ranks. The model's own loss, which
    training has, spreads a little over the padding, too.

    Args:
        model: as prepared; left in the mode it was found in.
        loader: prepared loader of batches of windows, from `WindowCollator`.
        accelerator: that prepared both.
        questions: rows that `check_questions` checked.
        windows: from `tokenize_questions` of the same rows, not for training.
        padding_side: of the tokenizer.
        metric: scores answers against right ones.
        has_unanswerable: whether "none" is an answer.
        settings: section ``eval``: how answers are found.

    Raises:
        TrainingError: where windows are missing, or the loss is not finite; on every rank.
    """
    was_training = model.training
    model.eval()
    try:
        measured = [_gather(_measure(model, batch), accelerator, padding_side) for batch in loader]
    finally:
        model.train(was_training)
    ids, losses, logits = (list(column) for column in zip(*measured, strict=True))
    window_losses, window_logits = each_row_once(
        torch.cat(ids), torch.cat(losses), _stack(logits, padding_side), num_rows=len(windows)
    )
    loss = require_finite(window_losses.mean().item())
    starts, ends = (list(scores.numpy()) for scores in window_logits.unbind(1))
    # Every rank scores, so that every rank has the score, or the error, without a word to the others.
    found = find_answers(
        questions,
        windows,
        starts,
        ends,
        has_unanswerable=has_unanswerable,
        n_best_size=settings.n_best_size,
        max_answer_length=settings.max_answer_length,
        null_score_diff_threshold=settings.null_score_diff_threshold,
        padding_side=padding_side,
    )
    scored = _score(found, questions, metric, settings)
    return Evaluation(
        scores={**scored.scores, "loss": loss},
        details={"metric": metric.name, "questions": scored.total, "windows": len(windows)},
        outputs=[found.texts[question] for question in questions["id"]],
    )


def refuse_unused_threshold(settings: QuestionAnsweringEvalConfig, *, has_unanswerable: bool) -> None:
    """Refuse a null score threshold where every question has an answer.

    Raises:
        ConfigError: as said.
    """
    threshold = settings.null_score_diff_threshold
    if threshold and not has_unanswerable:
        raise ConfigError(
            f"eval.null_score_diff_threshold is {threshold}, but every question has an answer; remove it, or set "
            "data.version_2_with_negative=true if questions may have none"
        )


def report_windows(splits: Mapping[str, Dataset], windows: Mapping[str, Dataset]) -> None:
    """Say how many windows the contexts of the questions were cut into."""
    for name, rows in windows.items():
        logger.info("%s: %d questions in %d windows", name, len(splits[name]), len(rows))


def write_predictions(
    folder: RunFolder, evaluations: Mapping[str, Mapping[str, Evaluation]], splits: Mapping[str, Dataset]
) -> None:
    """Write the answers to all questions as the official SQuAD scripts read them: text by id.

    Args:
        folder: gets ``predictions-<split>.json`` of the last and ``predictions-<split>-averaged.json`` of the
            averaged weights.
        evaluations: by split and kind of weights.
        splits: questions by split.
    """
    for split, kinds in evaluations.items():
        for kind, evaluation in kinds.items():
            name = f"predictions-{split}" if kind == "last" else f"predictions-{split}-{kind}"
            answers = dict(zip(splits[split]["id"], evaluation.outputs, strict=True))
            folder.write_json(f"{name}.json", answers)


def _score(
    found: Answers, questions: Dataset, metric: Measure, settings: QuestionAnsweringEvalConfig
) -> QuestionScores:
    right = right_answers(questions)
    if metric.name == "squad":
        return score_squad(found.texts, right)
    if not found.null_odds:
        return score_squad_v2(found.texts, right)
    return score_squad_v2(
        found.best_texts,
        right,
        found.null_odds,
        null_score_diff_threshold=settings.null_score_diff_threshold,
    )


def _measure(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Window numbers (B,), losses (B,) in float64 and logits (B, 2, L) in fp32 of a batch."""
    inputs = {name: value for name, value in batch.items() if name not in (*POSITIONS, ROW_ID)}
    logits = task_logits(model(**inputs)).float()
    targets = torch.stack([batch[name] for name in POSITIONS], dim=1)
    padding = (batch["attention_mask"] == 0).unsqueeze(1)
    losses = nn.functional.cross_entropy(
        logits.double().masked_fill(padding, -torch.inf).transpose(1, 2), targets, reduction="none"
    )
    return batch[ROW_ID], losses.mean(dim=1), logits


def _gather(
    measured: tuple[Tensor, Tensor, Tensor], accelerator: Accelerator, side: Side
) -> tuple[Tensor, ...]:
    """Put together what all ranks measured in a batch, on the host."""
    ids, losses, logits = measured
    logits = accelerator.pad_across_processes(logits, dim=2, pad_first=side == "left")
    return tuple(tensor.cpu() for tensor in accelerator.gather((ids, losses, logits)))


def _stack(logits: Sequence[Tensor], side: Side) -> Tensor:
    """Stack the logits of windows, (N, 2, L), padded to the longest of all on the side of the padding."""
    longest = max(rows.shape[2] for rows in logits)
    missing = (longest - rows.shape[2] for rows in logits)
    sides = ((length, 0) if side == "left" else (0, length) for length in missing)
    return torch.cat([nn.functional.pad(rows, pad) for rows, pad in zip(logits, sides, strict=True)])
