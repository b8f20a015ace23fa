"""Turns pairs of texts into batches for an encoder-decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from swaft.training.data.checks import padding, require_length
from swaft.training.data.texts import encode as encode_texts

IGNORED = -100
"""Label of positions that no loss counts."""


@dataclass(frozen=True)
class LengthStatistics:
    """How long the texts of a split are, in tokens with the special ones, before they are cut."""

    mean: float
    """Mean length."""
    p95: float
    """Length that 95 % of the texts do not exceed."""
    longest: int
    """Greatest length."""
    limit: int
    """Length that texts are cut to."""
    share_cut: float
    """Share of the texts that are longer than that, 0 to 1."""


def tokenize_pairs(
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_source_length: int,
    max_target_length: int,
    source_prefix: str = "",
    model_max_length: int | None = None,
) -> Dataset:
    """Turn pairs of texts into what an encoder-decoder reads, unpadded.

    Args:
        pairs: rows with `source` and `target`, from `read_pairs`.
        tokenizer: the model's tokenizer; targets are tokenized as such (`text_target`).
        max_source_length: tokens a source is cut to, prefix and special tokens included.
        max_target_length: tokens a target is cut to.
        source_prefix: put before every source; T5 is told its task so ("summarize: ").
        model_max_length: tokens the model reads at most; None: what its tokenizer says. Models with relative
            positions (T5) read more than that.

    Returns:
        A dataset with `input_ids`, `attention_mask`, (`token_type_ids`), `labels` (token ids), `idx`, the row
        number in `pairs`, and `source_length`, `target_length`: tokens before the cut.

    Raises:
        DataError: the model does not read that many tokens.
    """
    most = tokenizer.model_max_length if model_max_length is None else model_max_length
    require_length("data.max_source_length", max_source_length, most)
    require_length("data.max_target_length", max_target_length, most)

    def encode(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        sources = [source_prefix + text for text in rows["source"]]
        encoded, source_lengths = _cut(
            lambda texts, **cut: encode_texts(tokenizer, texts, **cut), sources, max_source_length
        )
        targets, target_lengths = _cut(
            lambda texts, **cut: encode_texts(tokenizer, text_target=texts, **cut),
            rows["target"],
            max_target_length,
        )
        return encoded | {
            "labels": targets["input_ids"],
            "idx": indices,
            "source_length": source_lengths,
            "target_length": target_lengths,
        }

    return pairs.map(encode, batched=True, with_indices=True, remove_columns=pairs.column_names)


def length_statistics(lengths: Sequence[int], limit: int) -> LengthStatistics:
    """Sum up lengths for a report.

    Args:
        lengths: tokens of each text before the cut (`source_length` or `target_length`), one at least.
        limit: tokens they are cut to.
    """
    found = np.asarray(lengths)
    return LengthStatistics(
        mean=float(found.mean()),
        p95=float(np.percentile(found, 95)),
        longest=int(found.max()),
        limit=limit,
        share_cut=float(np.mean(found > limit)),
    )


class Seq2SeqCollator:
    """Pads sources and targets to the longest of the batch and stacks them.

    Args:
        tokenizer: the model's tokenizer.
        length: tokens that every source is padded to; None: to the longest of the batch.
        multiple: number that divides the length of every batch of sources.

    Raises:
        DataError: the tokenizer has no padding token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, length: int | None = None, multiple: int | None = None
    ):
        self._pad = padding(tokenizer, length, multiple)
        self._inputs = frozenset(tokenizer.model_input_names) | {"idx"}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch, all int64.

        Token columns are (B, S), padded on the tokenizer's side; `labels` (B, T), padded on the right with -100;
        `idx` (B,).
        """
        inputs = [{name: value for name, value in row.items() if name in self._inputs} for row in rows]
        batch: dict[str, Tensor] = dict(self._pad(inputs))
        labels = [torch.as_tensor(row["labels"], dtype=torch.int64) for row in rows]
        batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        return batch


def _cut(
    tokenize: Callable[..., Any], texts: list[str], limit: int
) -> tuple[dict[str, list[list[int]]], list[int]]:
    """Tokenize texts; those that are too long a second time, cut. So the first lengths are known."""
    encoded = dict(tokenize(texts, verbose=False))
    lengths = [len(ids) for ids in encoded["input_ids"]]
    long = [row for row, length in enumerate(lengths) if length > limit]
    if long:
        shortened = tokenize([texts[row] for row in long], truncation=True, max_length=limit)
        for name, column in encoded.items():
            for row, values in zip(long, shortened[name], strict=True):
                column[row] = values
    return encoded, lengths
