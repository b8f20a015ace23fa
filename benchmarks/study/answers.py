"""Extractive question answering: the first and last token of the answer in a text, scored as in SQuAD 1.1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.study import model as encoder
from benchmarks.study.outcomes import Prediction
from benchmarks.study.rows import Rows, evaluation_batches
from swaft.training.evaluation.answering import exact_match, token_f1

MAX_LENGTH = 192
"""Tokens of question and text together; a row whose answer starts or ends beyond them is left out."""
MAX_ANSWER = 30
"""Most tokens in an answer."""


@dataclass(frozen=True)
class Questions(Rows):
    """Questions with their texts; ``labels`` (N, 2) are the positions of the answer's first and last token."""

    texts: tuple[str, ...]
    offsets: tuple[tuple[tuple[int, int], ...], ...]
    """The range of characters of the text that each token covers; (0, 0) for tokens outside the text."""
    answers: tuple[tuple[str, ...], ...]
    """Right answers."""

    def batch(self, places: Any) -> dict[str, Tensor]:
        """Keyword arguments of the model, with ``start_positions`` and ``end_positions`` (B,)."""
        rows = self.take(places)
        start, end = rows.labels.unbind(-1)
        return rows.inputs() | {"start_positions": start, "end_positions": end}


def read(columns: dict[str, list[Any]], tokenizer: Any) -> Questions:
    """Tokenize questions and texts, and find the tokens of the first right answer.

    Args:
        columns: question, context, answers.
        tokenizer: of the encoder.
    """
    encoded = tokenizer(
        columns["question"], columns["context"], truncation="only_second", max_length=MAX_LENGTH,
        return_offsets_mapping=True,
    )  # fmt: skip
    kept, labels, offsets = [], [], []
    for row, found in enumerate(columns["answers"]):
        within = [place == 1 for place in encoded.sequence_ids(row)]
        spans = encoded["offset_mapping"][row]
        spans = tuple(tuple(span) if inside else (0, 0) for span, inside in zip(spans, within, strict=True))
        first, stop = found["answer_start"][0], found["answer_start"][0] + len(found["text"][0])
        start = [place for place, (begin, end) in enumerate(spans) if begin <= first < end]
        last = [place for place, (begin, end) in enumerate(spans) if begin < stop <= end]
        if start and last:
            kept.append(row)
            labels.append((start[0], last[0]))
            offsets.append(spans)
    return Questions(
        ids=tuple(tuple(encoded["input_ids"][row]) for row in kept),
        segments=tuple(tuple(encoded["token_type_ids"][row]) for row in kept),
        labels=torch.tensor(labels, dtype=torch.long),
        texts=tuple(columns["context"][row] for row in kept),
        offsets=tuple(offsets),
        answers=tuple(tuple(columns["answers"][row]["text"]) for row in kept),
    )


def predict(model: nn.Module, rows: Questions) -> Prediction:
    """Logits of both ends over the positions of each row; exact match and F1 of the best spans, from 0 to 1."""
    found = {}
    with encoder.evaluating(model) as where:
        for places in evaluation_batches(rows):
            batch = {name: tensor.to(where) for name, tensor in rows.take(places).inputs().items()}
            output, beyond = model(**batch), ~batch["attention_mask"].bool()
            ends = torch.stack([output.start_logits, output.end_logits], 1).float()
            found |= zip(places.tolist(), ends.masked_fill(beyond[:, None], -torch.inf).cpu(), strict=True)
    longest = max(map(len, rows.ids))
    ends = [torch.nn.functional.pad(found[row], (0, longest - found[row].shape[-1]), value=-torch.inf)
            for row in range(len(rows))]  # fmt: skip
    texts = [best_answer(rows, row, found[row]) for row in range(len(rows))]

    def mean(score: Any) -> float:
        best = (
            max(score(text, right) for right in answers)
            for text, answers in zip(texts, rows.answers, strict=True)
        )
        return sum(best) / len(rows)

    return Prediction(
        torch.cat(ends),
        rows.labels.flatten(),
        score=lambda: {"exact": mean(exact_match), "f1": mean(token_f1)},
    )


def best_answer(rows: Questions, row: int, ends: Tensor) -> str:
    """The text of the span with the highest sum of logits, at most ``MAX_ANSWER`` tokens long.

    Args:
        rows: the questions.
        row: which of them.
        ends: (2, L), logits of the first and of the last token.
    """
    spans = rows.offsets[row]
    inside = torch.tensor([end > begin for begin, end in spans])
    start, last = (logits[: len(spans)].masked_fill(~inside, -torch.inf) for logits in ends)
    sums = start[:, None] + last[None, :]
    allowed = torch.ones_like(sums).triu() - torch.ones_like(sums).triu(MAX_ANSWER)
    best = int(sums.masked_fill(allowed == 0, -torch.inf).argmax())
    first, final = divmod(best, len(spans))
    return rows.texts[row][spans[first][0] : spans[final][1]]


def new_model(seed: int, device: torch.device) -> nn.Module:
    """The embedded MiniLM with a new head for both ends."""
    from transformers import AutoModelForQuestionAnswering

    return encoder.from_pack(AutoModelForQuestionAnswering, seed, device)
