"""Texts to token ids in which only what the tokenizer adds is special, whatever a text spells; ids to batches."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from string import ascii_letters, digits
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import (
    BatchEncoding,
    DataCollatorWithPadding,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from swaft.errors import DataError
from swaft.training.data.checks import is_blank, values

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of positions that no loss counts."""


class Collator:
    """Pads rows and stacks them.

    Args:
        tokenizer: the model's, which says with what and on which side.
        length: tokens that every row is padded to; None: to the longest of the batch.
        multiple: number that divides the length of every batch.

    Raises:
        DataError: the tokenizer has no padding token.
    """

    columns: tuple[str, ...] = ("labels", "idx")
    """What a batch has besides what models read."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, length: int | None = None, multiple: int | None = None
    ):
        if tokenizer.pad_token_id is None:
            raise DataError(
                f"{type(tokenizer).__name__} has no padding token, so rows of different length cannot share "
                "a batch; set model.tokenizer_name to a tokenizer that has one"
            )
        self.padding: Any = tokenizer.pad_token_id
        self._names = frozenset((*tokenizer.model_input_names, *self.columns))
        self._pads_left = tokenizer.padding_side == "left"
        self._pad = DataCollatorWithPadding(
            tokenizer,
            padding="longest" if length is None else "max_length",
            max_length=length,
            pad_to_multiple_of=multiple,
        )

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch: token columns (B, L) int64, others (B,) int64, or fp32 for fractions."""
        return dict(self._pad([{name: row[name] for name in row if name in self._names} for row in rows]))


def read_as_text(tokenizer: PreTrainedTokenizerBase, split_special_tokens: bool) -> None:
    """Set whether a special token that a text spells is text, or has its meaning; a saved tokenizer knows it."""
    tokenizer.split_special_tokens = split_special_tokens
    if _can_split(tokenizer):
        tokenizer.init_kwargs["split_special_tokens"] = split_special_tokens


def encode(tokenizer: PreTrainedTokenizerBase, *texts: Any, **options: Any) -> BatchEncoding:
    """Tokenize a batch of texts, or of pairs.

    Where special tokens are read as text (see `read_as_text`), those that the tokenizer cannot split become unknown
    words: words of its vocabulary, as in T5's, and all of a slow tokenizer to which words were added. A token that
    is for padding alone stays what it is: some pad with a word ("!"), and the attention mask tells the two apart.

    Args:
        tokenizer: the model's.
        texts: one list of texts, or two of pairs.
        options: of the tokenizer's call.

    Returns:
        What the tokenizer returns, lists of `input_ids` among it.

    Raises:
        DataError: for such a word where the tokenizer has no token for unknown words.
    """
    if not tokenizer.split_special_tokens:
        return tokenizer(*texts, **options)
    encoded = tokenizer(
        *texts, split_special_tokens=_can_split(tokenizer), return_special_tokens_mask=True, **options
    )
    unknown: Any = tokenizer.unk_token_id
    padding: Any = tokenizer.pad_token_id
    names = set(tokenizer.special_tokens_map) - {"pad_token", "unk_token"}
    meant = {getattr(tokenizer, f"{name}_id") for name in names}
    special = frozenset(tokenizer.all_special_ids) - ({unknown, padding} - meant)
    for ids, added in zip(encoded["input_ids"], encoded.pop("special_tokens_mask"), strict=True):
        if sum(map(special.__contains__, ids)) == sum(added):  # nearly always, and quick to see
            continue
        added = added[-len(ids) :]  # ByT5 adds no end to a text that spells one there
        for position, (token, was_added) in enumerate(zip(ids, added, strict=True)):
            if token in special and not was_added:
                if unknown is None:
                    raise DataError(
                        f"a text spells {tokenizer.convert_ids_to_tokens(token)}, which is a word of "
                        f"{type(tokenizer).__name__}, and there is no token for unknown words to put in its place; "
                        "remove it from the texts, or set data.split_special_tokens=false"
                    )
                ids[position] = unknown
    return encoded


def without_letters(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bool]:
    """Return whether a text has no letter or digit that the tokenizer knows: of others it may make no token."""
    known = {
        letter
        for letter in ascii_letters + digits
        if tokenizer(letter, add_special_tokens=False)["input_ids"]
    }
    return known.isdisjoint


def refuse_rows_without_tokens(splits: Mapping[str, Dataset], columns: Sequence[str], tokenizer: Any) -> None:
    """Refuse texts that become no token at all, where the tokenizer adds none (GPT-2, Qwen): no model reads them.

    The tokenizer takes the texts of these columns, one or two, together.

    Raises:
        DataError: names the row.
    """
    if tokenizer(*[""] * len(columns))["input_ids"]:
        return
    is_doubtful = without_letters(tokenizer)
    for name, split in splits.items():
        for row, texts in enumerate(zip(*(values(split, column) for column in columns), strict=True)):
            if all(map(is_doubtful, texts)) and not tokenizer(*texts)["input_ids"]:
                found = "an empty text" if all(map(is_blank, texts)) else f"the text {texts[0]!r}"
                raise DataError(
                    f"row {row} of {name} has {found}, of which {type(tokenizer).__name__} makes no token. "
                    "Remove the row or fill it in, or leave such rows out with data.skip_bad_rows=true"
                )


def report_special_tokens(
    splits: Mapping[str, Dataset], columns: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Log in how many rows a text spells a special token, and what becomes of it.

    Raises:
        DataError: where `encode` refuses such a text.
    """
    spelled = re.compile(
        "|".join(map(re.escape, sorted(tokenizer.all_special_tokens, key=len, reverse=True)))
    )
    read = "are text" if tokenizer.split_special_tokens else "have their special meaning"
    other = str(not tokenizer.split_special_tokens).lower()
    for name, split in splits.items():
        found = [
            (row, match.group(), texts)
            for row, texts in enumerate(zip(*(values(split, column) for column in columns), strict=True))
            if (match := next(filter(None, map(spelled.search, texts)), None))
        ]
        if not found:
            continue
        logger.warning(
            "%d rows of %s spell special tokens (row %d: %s), which %s; "
            "set data.split_special_tokens=%s to change that",
            *(len(found), name, *found[0][:2], read, other),
        )
        encode(tokenizer, [text for *_, texts in found for text in texts], verbose=False)


def _can_split(tokenizer: Any) -> bool:
    if not isinstance(tokenizer, PreTrainedTokenizer):
        return isinstance(
            tokenizer, PreTrainedTokenizerFast
        )  # mistral-common's reads no such token from a text
    # Slow tokenizers lose words that were added to them, too; to ESM's, all words were.
    added = set(map(str, tokenizer.added_tokens_decoder.values()))
    return added <= set(tokenizer.all_special_tokens) and not hasattr(tokenizer, "unique_no_split_tokens")
