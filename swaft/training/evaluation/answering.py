"""Evaluates what a model answers, on every window exactly once, however many ranks share the work."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from swaft.errors import ConfigError
from swaft.noise.outputs import task_logits
from swaft.training.config import QuestionAnsweringEvalConfig
from swaft.training.data import Answers, find_answers, right_answers
from swaft.training.data.question_answering import POSITIONS
from swaft.training.evaluation.evaluate import ROW_ID, Evaluation, each_row_once, require_finite
from swaft.training.metrics import QuestionMetric, QuestionScores, score_squad, score_squad_v2
from swaft.training.run.folder import RunFolder

logger = logging.getLogger(__name__)

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
    metric: QuestionMetric,
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
    found: Answers, questions: Dataset, metric: QuestionMetric, settings: QuestionAnsweringEvalConfig
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
