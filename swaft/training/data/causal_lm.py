"""Prompts with answers, chats and texts as rows for a decoder: which tokens are given, and which are learnt.

The settings specific to models that continue a text come first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from datasets import ClassLabel, Dataset, Value
from torch import Tensor

from swaft.errors import DataError
from swaft.options import Count, Range, WholeNumber
from swaft.training.config.schema import EvalConfig, Fault, RecipeConfig, RowsConfig
from swaft.training.config.values import literal_breaks
from swaft.training.data.chats import TEMPLATE_ARGUMENTS, TokenRow, chat_faults, chat_tokens, refuse_messages
from swaft.training.data.files import map_rows
from swaft.training.data.seq2seq import Seq2SeqModelConfig, Seq2SeqTrainConfig, log_lengths
from swaft.training.data.texts import (
    IGNORED,
    BadRow,
    Collator,
    encode,
    good_rows,
    padded,
    read_as_text,
    refuse_split_settings,
    require_column,
    special_tokens,
    spelled_tokens,
    text_faults,
    usual_columns,
    values,
)

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class CausalDataConfig(RowsConfig):
    """Which rows to train and evaluate on, and which of their columns."""

    prompt_column: str | None = None
    """Column with the prompt; null: both columns are found by their usual names (prompt and completion,
    instruction and output, question and answer, ...), or else the column of messages or of texts."""
    answer_column: str | None = None
    """Column with the text to learn; set it with `prompt_column`, or alone for texts without a prompt."""
    messages_column: str | None = None
    """Column with chats: lists of messages with a role and a content, formatted by the tokenizer's chat template.
    The assistant's answers are learnt, except those with `weight: 0`."""
    prompt_prefix: str = ""
    """Text put before every prompt."""
    prompt_suffix: str = ""
    """Text put between every prompt and its answer: a line break, say."""
    max_length: Annotated[int, Range(low=2)] = 512
    """Longest row in tokens, prompt and answer together. An answer is cut to the room its prompt leaves, but to no
    less than half of the row; a longer prompt loses its beginning, but not the special tokens in front of it. Chats
    are cut at the end."""
    packing: bool = False
    """Pack several rows into one of `max_length` tokens, each with its own positions and unable to attend to the
    others. Off; turning it on saves the padding of short rows."""

    def conflicts(self) -> Iterator[Fault]:
        """Yield also columns of texts next to columns of chats, and line breaks that are none."""
        yield from super().conflicts()
        yield from literal_breaks(self, "prompt_prefix", "prompt_suffix")
        if self.prompt_column is not None and self.answer_column is None:
            yield "prompt_column", "is set without data.answer_column; set both"
        if self.messages_column is not None and self.answer_column is not None:
            yield "messages_column", "is for chats, and data.answer_column for texts; keep one"


@dataclass(kw_only=True)
class CausalEvalConfig(EvalConfig):
    """When and how to evaluate: by the loss, perplexity and accuracy over the tokens that are learnt."""

    per_device_eval_batch_size: Count = 8
    """Rows per device and evaluation batch, whose logits are kept. Changes speed and memory, not the result."""
    metric: str = "auto"
    """The loss; there is no other choice."""
    num_samples: WholeNumber = 20
    """Rows of each split whose last answer is generated at the end of the run, by last and by averaged weights, and
    kept in the run folder; 0: none."""
    max_new_tokens: Count = 64
    """Longest of those answers, in tokens; shorter if a prompt leaves less of `data.max_length`."""

    tasks: ClassVar = ()


@dataclass(frozen=True, kw_only=True)
class CausalConfig(RecipeConfig):
    """Everything `recipes/causal_lm.py` needs."""

    task: ClassVar[str] = "causal language modelling"

    model: Seq2SeqModelConfig = field(default_factory=Seq2SeqModelConfig)
    data: CausalDataConfig = field(default_factory=CausalDataConfig)
    train: Seq2SeqTrainConfig
    eval: CausalEvalConfig = field(default_factory=CausalEvalConfig)

    def conflicts(self) -> Iterator[Fault]:
        """Yield also packing without a number of steps: how many rows are left is known only after packing."""
        yield from super().conflicts()
        if self.data.packing and self.train.max_steps < 1:
            yield "data.packing", "how many rows are left is known once they are packed; set train.max_steps"


USUAL_COLUMNS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("source", "target"),
)
USUAL_MESSAGES = (("messages",), ("conversations",), ("conversation",))
USUAL_TEXTS = (("text",), ("content",))


@dataclass(frozen=True)
class CausalColumns:
    """Which columns hold what is given and what is learnt."""

    answer: str | None
    """Column with the text to learn; None: it is in the messages."""
    prompt: str | None = None
    """Column with the prompt; None: there is none."""
    messages: str | None = None
    """Column with chats."""
    rows: Mapping[str, Dataset] = field(default_factory=dict, repr=False, compare=False)
    """Rows by split, without those left out."""

    def __str__(self) -> str:
        """Return the columns."""
        return " -> ".join(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """All columns to read."""
        return tuple(name for name in (self.messages, self.prompt, self.answer) if name is not None)


def find_columns(splits: Mapping[str, Dataset], data: CausalDataConfig) -> CausalColumns:
    """Find the columns, and check them in every row of every split.

    Raises:
        DataError: a column that does not exist or has to be specified; a missing or empty text; a chat without
            messages, or without an answer of the assistant; a prompt prefix or suffix for chats.
    """
    found = _named(splits["train"], data)
    if found.messages is not None and (data.prompt_prefix or data.prompt_suffix):
        raise DataError(
            "data.prompt_prefix and data.prompt_suffix are put around prompts, but the rows are chats, which the "
            "tokenizer's template formats; remove them"
        )
    tools = values(splits["train"], "tools") if "tools" in splits["train"].column_names else ()
    if found.messages is not None and any(tools):
        raise DataError(
            "the rows have a column 'tools', which is not written into the chats; put the tools into the system's "
            "message, or remove the column"
        )
    if found.answer is not None:
        splits = {name: _class_names_as_text(split, found.answer) for name, split in splits.items()}
    rows = good_rows(splits, found.names, partial(_faults, columns=found), skip=data.skip_bad_rows)
    return replace(found, rows=rows)


def require_chat_template(tokenizer: Any, columns: CausalColumns) -> None:
    """Refuse chats if the tokenizer (the model's; None: a new one) has no chat template.

    Raises:
        DataError: names the tokenizer.
    """
    if columns.messages is None:
        return
    if tokenizer is None or tokenizer.chat_template is None:
        which = "a new tokenizer" if tokenizer is None else type(tokenizer).__name__
        raise DataError(
            f"data.messages_column={columns.messages}, but {which} has no chat template; use a "
            "model trained on chats, or set tokenizer.chat_template and save it"
        )


def tokenize_rows(
    splits: Mapping[str, Dataset], tokenizer: Any, columns: CausalColumns, data: CausalDataConfig
) -> dict[str, Dataset]:
    """Turn rows into token ids, unpadded.

    A prompt gets the special tokens with which the tokenizer starts a text, an answer gets none; the end-of-text
    token (or the separator of a BERT's tokenizer, which has none) follows it and is learnt. Neither is repeated
    where a text spells it as a special token. The first token of a row is never learnt: nothing comes before it. In
    a chat, the assistant's messages are learnt, except one that opens the chat, which answers nothing, those with
    weight 0, and what the template formats differently in later turns (see `chat_tokens`).

    Args:
        splits: rows that `find_columns` checked, by split.
        tokenizer: the model's.
        columns: what `find_columns` found.
        data: section ``data``.

    Returns:
        Datasets with `input_ids`, `labels` (token ids, `IGNORED` where nothing is learnt), `idx`, the row
        number, and for `report_rows` and `ends_of_answers` the other fields of `TokenRow`.

    Raises:
        DataError: a row that the chat template refuses, or with nothing to learn within `data.max_length` tokens,
            unless `data.skip_bad_rows` leaves out such rows; a special token in `data.prompt_prefix` or
            `data.prompt_suffix` that would be read as text.
    """
    workers, skip = data.preprocessing_num_workers, data.skip_bad_rows
    # `map` pickles whatever the function holds, to name its cache.
    data = replace(data, preprocessing_num_workers=None, skip_bad_rows=False)
    columns = replace(columns, rows={})

    def row_tokens(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        made = list(_tokens(rows, tokenizer, columns, data))
        cut = [(row.ids[: data.max_length], row.labels[: data.max_length]) for row in made]
        full = (
            f"has no token to learn within data.max_length={data.max_length}: the messages before its first answer "
            "fill it; raise data.max_length"
        )
        return {
            "input_ids": [ids for ids, _ in cut],
            "labels": [labels for _, labels in cut],
            "idx": indices,
            "length": [row.length for row in made],
            "end": [row.end if row.length <= data.max_length else IGNORED for row in made],
            "changed": [row.changed for row in made],
            "fault": [
                row.fault or ("" if any(label != IGNORED for label in labels) else full)
                for row, (_, labels) in zip(made, cut, strict=True)
            ],
        }

    # If the template's own special tokens were read as text, chats would be learnt and generated without any.
    read_as_text(tokenizer, data.split_special_tokens and columns.messages is None)
    refuse_split_settings(tokenizer, data, "prompt_prefix", "prompt_suffix")
    # Only special tokens spelled in messages become text: other control tokens (`<think>`) belong to answers.
    control, tokenizer.chat_control_tokens = tokenizer.chat_control_tokens, []
    try:
        made = {name: map_rows(split, row_tokens, workers) for name, split in splits.items()}
    finally:
        tokenizer.chat_control_tokens = control
    # The saved tokenizer keeps this setting, and prompts are written with special tokens, by templates or by hand.
    read_as_text(tokenizer, False)
    kept = good_rows(made, (), _untrainable, skip=skip)
    return {name: _renumbered(rows.remove_columns("fault"), len(made[name])) for name, rows in kept.items()}


def report_rows(train: Dataset, data: CausalDataConfig) -> None:
    """Log how long the training rows are, how many are cut, and how many answers are not learnt as a whole."""
    log_lengths("rows", train["length"][:], data.max_length)
    if changed := sum(train["changed"]):
        logger.info(
            "%d answers before the last ones are learnt in part or not at all: the chat template formats them "
            "differently once the chat goes on",
            changed,
        )


def ends_of_answers(train: Dataset) -> set[int]:
    """Return the special tokens with which the chat template, or a tokenizer without an end token, ends answers."""
    return {*train.unique("end")} - {IGNORED}


def asked_rows(rows: Dataset, number: int, tokenizer: Any) -> Dataset:
    """Return the first rows without their last answer, as prompts to generate it from.

    Args:
        rows: from `tokenize_rows`.
        number: most rows to return.
        tokenizer: the one they were tokenized with.

    Returns:
        A dataset with `input_ids` (the tokens before the answer), and `prompt` and `answer` as texts.
    """
    cut: dict[str, list[Any]] = {"input_ids": [], "prompt": [], "answer": []}
    rows_asked = rows[:number]
    for ids, labels in zip(rows_asked["input_ids"], rows_asked["labels"], strict=True):
        learnt = [label != IGNORED for label in labels]
        end = max(place for place, each in enumerate(learnt, start=1) if each)
        first = end - learnt[end - 1 :: -1].index(False)  # the first token of a row is never learnt
        cut["input_ids"].append(ids[:first])
        cut["prompt"].append(tokenizer.decode(ids[:first], skip_special_tokens=True).strip())
        cut["answer"].append(tokenizer.decode(ids[first:end], skip_special_tokens=True).strip())
    return Dataset.from_dict(cut)


class CausalCollator(Collator):
    """Pads rows on the right, labels with `IGNORED`; packed rows have positions instead of an attention mask."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch, int64: `input_ids`, `labels`, `attention_mask` or `position_ids` (B, L), `idx` (B,)."""
        batch = {
            "input_ids": padded(rows, "input_ids", self.padding),
            "labels": padded(rows, "labels", IGNORED),
        }
        if "position_ids" in rows[0]:
            batch["position_ids"] = padded(rows, "position_ids", 0)
        else:
            ones = [{"attention_mask": [1] * len(row["input_ids"])} for row in rows]
            batch["attention_mask"] = padded(ones, "attention_mask", 0)
        return batch | {"idx": torch.tensor([row["idx"] for row in rows])}


def _named(train: Dataset, data: CausalDataConfig) -> CausalColumns:
    columns = {name: getattr(data, f"{name}_column") for name in ("messages", "prompt", "answer")}
    for name, column in columns.items():
        if column is not None:
            require_column(train, column, f"data.{name}_column")
    if columns["messages"] is None and columns["answer"] is None:
        unusual = (
            "no columns have usual names for prompts and answers, chats or texts; {}; set data.prompt_column and "
            "data.answer_column, or data.messages_column"
        )
        found = usual_columns(train, (*USUAL_COLUMNS, *USUAL_MESSAGES, *USUAL_TEXTS), unusual)
        if found in USUAL_MESSAGES:
            columns["messages"] = found[0]
        else:
            columns |= {"answer": found[-1], "prompt": found[0] if len(found) > 1 else None}
        _refuse_unread(train, found)
    return CausalColumns(**columns)


UNREAD = (
    *("input", "context", "system", "system_prompt", "history"),
    *("article", "passage", "choices", "options"),
)
"""Columns with another part of the prompt, which would not be read; the last four are RACE's and MMLU's."""


def _refuse_unread(train: Dataset, found: tuple[str, ...]) -> None:
    """Refuse rows like Alpaca's and Dolly's, whose prompt has a second part in a column of its own."""
    if found in USUAL_TEXTS:
        return
    there = (each for each in UNREAD if each in train.column_names)
    more = next(
        (each for each in there if any(str(value or "").strip() for value in values(train, each))), None
    )
    if more is None:
        return
    if found in USUAL_MESSAGES:
        put, named = "put it into the chats as messages", f"data.messages_column={found[0]}"
    else:
        put = f"put it into the column '{found[0]}'"
        named = f"data.prompt_column={found[0]} data.answer_column={found[-1]}"
    raise DataError(
        f"the rows have '{more}' besides {' and '.join(found)}, and it would not be read; {put}, or leave it out "
        f"with {named}"
    )


def _class_names_as_text(split: Dataset, column: str) -> Dataset:
    """Return the split with class names instead of class ids, if the column has classes."""
    kind = split.features.get(column)
    if not isinstance(kind, ClassLabel):
        return split
    numbers = values(split, column)  # -1 for a row without its answer
    names = [None if number is None or number < 0 else kind.int2str(number) for number in numbers]
    return split.remove_columns(column).add_column(column, names, feature=Value("string"))


def _faults(split: Dataset, columns: CausalColumns) -> Iterator[BadRow]:
    for column in filter(None, (columns.prompt, columns.answer)):
        yield from refuse_messages(split, column)
        yield from text_faults(split, column)
    if columns.messages is not None:
        yield from chat_faults(split, columns.messages)


def _untrainable(split: Dataset) -> Iterator[BadRow]:
    return ((row, fault) for row, fault in enumerate(values(split, "fault")) if fault)


def _renumbered(rows: Dataset, before: int) -> Dataset:
    """Return the rows of a split with row numbers from 0, if there were more of them before."""
    if len(rows) == before:
        return rows
    return rows.remove_columns("idx").add_column("idx", [*range(len(rows))])


def _tokens(
    rows: Mapping[str, list[Any]], tokenizer: Any, columns: CausalColumns, data: CausalDataConfig
) -> Iterator[TokenRow]:
    """Yield the token ids of each row."""
    if columns.messages is not None:
        # Telling them apart takes a hundred times as long, so it is done only if a message spells one.
        spelled, special = spelled_tokens(tokenizer), {*special_tokens(tokenizer).values()}
        chats = rows[columns.messages]
        for chat, arguments in zip(chats, rows.get(TEMPLATE_ARGUMENTS, [None] * len(chats)), strict=True):
            spelt = data.split_special_tokens and spelled.search(str((chat, arguments))) is not None
            try:
                yield chat_tokens(chat, tokenizer, arguments or {}, special, plain=spelt)
            except DataError as error:  # a column of Arrow cannot begin with a thousand empty lists
                yield TokenRow([0], [IGNORED], 1, fault=str(error))
        return
    answers = rows[columns.answer]  # type: ignore[index]
    prompts = rows[columns.prompt] if columns.prompt is not None else [""] * len(answers)
    texts = [f"{data.prompt_prefix}{prompt}{data.prompt_suffix}" for prompt in prompts]
    given = encode(tokenizer, texts, add_special_tokens=False)["input_ids"]
    learnt = encode(tokenizer, answers, add_special_tokens=False)["input_ids"]
    (front, back), eos = _tokens_around(tokenizer), tokenizer.eos_token_id
    end = back[:1] if eos is None else [eos]  # a BERT's tokenizer ends texts with a separator
    separator = end[0] if eos is None and end else IGNORED
    spells = not tokenizer.split_special_tokens
    for prompt, answer in zip(given, learnt, strict=True):
        starts = spells and [*prompt, *answer][: len(front)] == front
        before = prompt if starts else [*front, *prompt]
        after = answer if spells and answer[-1:] == end else [*answer, *end]
        length = len(before) + len(after)
        # The answer may take half of a row, or more if the prompt leaves room; a prompt keeps its end.
        after = after[: max(data.max_length // 2, data.max_length - len(before))]
        more = max(0, len(before) + len(after) - data.max_length)
        before = before[: len(front)] + before[len(front) + more :]
        ids = [*before, *after]
        labels = [IGNORED] * len(before) + after
        yield TokenRow(ids, [IGNORED, *labels[1:]], length, separator)


def _tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after every text."""
    whole, bare = (tokenizer("a", add_special_tokens=each)["input_ids"] for each in (True, False))
    for place in range(len(whole)):
        if whole[place : place + len(bare)] == bare:
            return whole[:place], whole[place + len(bare) :]
    return [], []
