"""Chats, checked and as token ids: what a template writes for the assistant's answers is learnt, the rest given."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import takewhile
from operator import eq
from typing import Any, NamedTuple

from datasets import Dataset, Json
from jinja2 import TemplateError

from swaft.errors import DataError
from swaft.training.data.texts import IGNORED, BadRow, ColumnFault, values

SILENT = {"role": "assistant", "content": ""}
"""An answer that only calls tools, without its calls."""
TEMPLATE_ARGUMENTS = "chat_template_kwargs"
"""Column with arguments of the chat template for a row, as TRL names it: `{"enable_thinking": false}`."""
OF_THE_TOKENIZER = frozenset(
    ("tokenize", "padding", "truncation", "max_length", "return_tensors", "tokenizer_kwargs")
)
"""Arguments of `apply_chat_template` that would change what it returns."""


class TokenRow(NamedTuple):
    """A row as token ids, before it is cut to `data.max_length`."""

    ids: list[int]
    """Token ids."""
    labels: list[int]
    """The same, `IGNORED` where nothing is learnt."""
    length: int
    """Tokens before anything was cut off."""
    end: int = IGNORED
    """Special token that ends the last answer, if it may be another than the end-of-text token; else `IGNORED`."""
    changed: int = 0
    """Answers of a chat that the template formats differently later on: learnt in part, or not at all."""
    fault: str = ""
    """Why the row cannot be used."""


def is_learnt(message: Mapping[str, Any]) -> bool:
    """Whether a message is an answer to learn: OpenAI's chats give one that is only context the weight 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def chat_faults(split: Dataset, column: str) -> Iterator[BadRow]:
    """Yield the rows whose chat is none, or has no answer to learn, or whose template's arguments are none.

    A column of texts, or of contents that are not all texts, yields a `ColumnFault`.
    """
    there = f"in column '{column}'"
    feature = getattr(split.features[column], "feature", None)
    if isinstance(feature, dict) and isinstance(feature.get("content"), Json):
        # Json decodes a text such as "7" to a number, so rows that look right may not be.
        chats = list(enumerate(values(split, column)))
        row, chat = next((each for each in chats if not all(map(_is_message, each[1] or ()))), chats[0])
        kinds = "contents of several types, so a text like '7' is read as a number; write each as text"
        yield row, ColumnFault(f"has {chat!r:.200} {there}, which has {kinds}")
    for row, chat in enumerate(values(split, column)):
        messages = chat if isinstance(chat, list) else []
        if isinstance(chat, str):
            kept = "a list of messages (json lines and parquet keep lists, csv does not)"
            yield row, ColumnFault(f"has the text {chat!r:.80} {there}; expected {kept}")
        elif odd := [message for message in messages if not _is_message(message)]:
            expected = f"expected messages with a role and a content (or tool_calls){_mend(odd[0])}"
            yield row, f"has {chat!r:.80} {there}; {expected}"
        elif not any(map(is_learnt, messages[1:])):
            yield row, f"has no message of the assistant after another {there}; expected one to learn"
    if TEMPLATE_ARGUMENTS in split.column_names:
        for row, found in enumerate(values(split, TEMPLATE_ARGUMENTS)):
            if not isinstance(found, Mapping | None) or OF_THE_TOKENIZER & without_nulls(found or {}).keys():
                expected = "expected an object with arguments of the chat template, not of the tokenizer"
                yield row, f"has {found!r:.80} in column '{TEMPLATE_ARGUMENTS}'; {expected}"


def _is_message(found: Any) -> bool:
    if not isinstance(found, Mapping) or "role" not in found:
        return False
    content = found.get("content")
    return isinstance(content, str) or (content is None and bool(found.get("tool_calls")))


def _mend(found: Any) -> str:
    """Say how a message of a known other form is written in this one."""
    if not isinstance(found, Mapping):
        return ""
    if "value" in found and "from" in found:
        return ": write ShareGPT's 'from' as role ('human' as user, 'gpt' as assistant) and its 'value' as content"
    if isinstance(found.get("content"), list):
        return ": write the parts of a content as one text"
    return ""


def refuse_messages(split: Dataset, column: str) -> Iterator[BadRow]:
    """Yield a `ColumnFault` if a column for texts has messages, as TRL's prompts and completions may have."""
    row, found = next((each for each in enumerate(values(split, column)) if each[1]), (0, None))
    if isinstance(found, list) and isinstance(found[0], Mapping) and "role" in found[0]:
        mend = (
            "chats are read from one column: put all their messages there, and set data.messages_column to it"
        )
        yield row, ColumnFault(f"has {found!r:.80} in column '{column}'; expected text; {mend}")


def chat_tokens(
    chat: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    arguments: Mapping[str, Any],
    special: Collection[int],
    *,
    plain: bool,
) -> TokenRow:
    """Turn a chat into token ids, up to its last answer.

    Many templates format the last answer differently from earlier ones: they drop the thoughts of earlier ones, or
    end only the last one with the end of the text. Of each answer, those tokens are learnt that the model has to
    write when it is asked for this answer, with the same tokens before them: of the last answer all, with its end.

    Args:
        chat: messages with a role, and an answer to learn after the first.
        tokenizer: the model's, with a chat template.
        arguments: of the chat template, for this row.
        special: ids of the tokenizer's special tokens.
        plain: whether a special token spelled in a message or an argument is text; those of the template never are.

    Raises:
        DataError: the template refuses the chat, leaves out calls of tools that are an answer, or does not continue
            its own prompt with the last answer. The message is a predicate, as in `BadRow`.
    """
    # Arrow gives every message the fields of all messages, and every tool call the arguments of all calls.
    # Templates treat a null as a value.
    chat, arguments = without_nulls(chat), without_nulls(arguments)
    template = f"the chat template of {type(tokenizer).__name__}"

    def ids_of(messages: Sequence[Mapping[str, Any]], *, prompts: bool = False) -> list[int]:
        options = {"add_generation_prompt": prompts, "sanitize_control_tokens": plain, "return_dict": False}
        try:
            return list(tokenizer.apply_chat_template(messages, **{**arguments, **options}))
        except (TemplateError, TypeError, ValueError) as error:
            # The last two come from the template's own code, or from keeping special tokens apart.
            raise DataError(f"has a chat that {template} refuses ({error}): {chat!r:.200}") from error

    places = [place for place, message in enumerate(chat) if place > 0 and is_learnt(message)]
    ids = ids_of(chat[: places[-1] + 1])
    labels, changed = [IGNORED] * len(ids), 0
    for place in places:
        is_last = place == places[-1]
        given = ids_of(chat[:place], prompts=True)
        asked, agreed = ids if is_last else ids_of(chat[: place + 1]), 0
        if "content" not in chat[place] and asked == ids_of([*chat[:place], SILENT]):
            raise DataError(f"has a tool call that {template} does not write: {chat[place]!r:.200}")
        if given == ids[: len(given)]:
            agreed = _agreement(asked, ids)
            labels[len(given) : agreed] = ids[len(given) : agreed]
        elif is_last:
            begin = _agreement(given, ids)
            prompt, answer = (tokenizer.decode(each[begin:])[:40] for each in (given, ids))
            raise DataError(
                f"has an answer that cannot be told from the messages before it: {template} asks for it with "
                f"{prompt!r}, and then writes {answer!r} in that place; if the answer begins with line breaks, "
                "which form one token with the template's, remove them, else use another template, or columns with "
                "prompts and answers"
            )
        changed += agreed < len(asked)
    return TokenRow(ids, [IGNORED, *labels[1:]], len(ids), _end(labels, tokenizer, special), changed)


def without_nulls(found: Any) -> Any:
    """Return a JSON value without the nulls in its objects, at any depth."""
    if isinstance(found, Mapping):
        return {key: without_nulls(value) for key, value in found.items() if value is not None}
    return [*map(without_nulls, found)] if isinstance(found, list) else found


def _agreement(some: Sequence[int], others: Sequence[int]) -> int:
    """Return how many tokens two rows begin with alike."""
    return sum(1 for _ in takewhile(bool, map(eq, some, others)))


def _end(labels: Sequence[int], tokenizer: Any, special: Collection[int]) -> int:
    """Return the special token at the end of the labels, where only white space may follow it, or `IGNORED`."""
    for token in reversed(labels):
        if token == IGNORED or (token in special and token != tokenizer.unk_token_id):
            return token
        if tokenizer.decode([token]).strip():
            break
    return IGNORED
