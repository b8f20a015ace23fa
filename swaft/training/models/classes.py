"""The classes of a task and the head of a pretrained classifier: whether it is kept, and in which order."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from typing import Any

from swaft.errors import ConfigError
from swaft.training.config import ModelConfig
from swaft.training.data.classification import TRUTH, Task
from swaft.training.data.texts import shortened
from swaft.training.models.special_tokens import write_token

logger = logging.getLogger(__name__)

READ_THEIR_END = frozenset({"bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5"})
"""Types whose classifiers answer at the last end-of-text token, and need equally many of them in every row."""
OTHER_HEADS = ("ForTokenClassification", "ForMultipleChoice")
"""Suffixes of architectures whose head may be named like a classifier's, and would be loaded as one."""


@dataclass(frozen=True)
class FittedHead:
    """A task and the head that is to learn it."""

    task: Task
    """The task, with its classes in the order of the head."""
    is_new: bool
    """Whether to replace the head that the model may bring; a model without a head gets a new one anyway."""
    order: tuple[int, ...] | None = None
    """The rows' own id of each class, if the head has its own order."""


def fit_head(task: Task, model: ModelConfig, model_config: Any) -> FittedHead:
    """Put the classes of a task into the order of the model's own head, if that head is kept.

    A kept head identifies each class by its position. Classes are matched by name, ignoring case, spaces, hyphens
    and underscores, or by number (3, LABEL_3). If one side has no names, the rows' ids are taken to be the model's;
    texts are not, because nothing says which of them LABEL_0 is. The order in use is logged. ``model_config`` is as
    the model brings it.

    Raises:
        ConfigError: the head is for other classes, or another number of them, and no new one is asked for.
    """
    held = [str(name) for _, name in sorted((model_config.id2label or {}).items())]
    rows = task.label_names or [str(number) for number in range(task.num_labels)]
    names, own, architectures = _named(held), _named(rows), model_config.architectures or []
    # A configuration with class names but no architecture is from an old classifier.
    if not any("ForSequenceClassification" in name for name in architectures) and (
        architectures or not names
    ):
        return FittedHead(task, is_new=any(name.endswith(OTHER_HEADS) for name in architectures))
    places = None
    if model_config.num_labels == task.num_labels:
        if task.is_regression:
            return FittedHead(task, is_new=False)
        numbers = _numbers(rows), _numbers(held)
        if numbers[0] is not None and numbers[1] is not None:
            places = _places_of_numbers(numbers[0], numbers[1])
            by_id = places == list(range(len(rows)))
        else:
            places = _places(rows, held)
            has_texts = any(isinstance(label, str) for label in task.label_ids)
            by_id = places is None and (own is None or (names is None and not has_texts))
        if by_id:
            names = names or task.label_names
            logger.info("the model keeps its head; class ids are taken as they are%s", _listed(names))
            return FittedHead(replace(task, label_names=names), is_new=False)
    if places is not None:
        ids = {label: places[number] for label, number in task.label_ids.items()}
        order = tuple(sorted(range(len(places)), key=places.__getitem__))
        names = names or [rows[number] for number in order]
        logger.info("the model keeps its head; classes are in its order%s", _listed(names))
        return FittedHead(replace(task, label_names=names, label_ids=ids), is_new=False, order=order)
    if model.ignore_mismatched_sizes:
        return FittedHead(task, is_new=True)
    found = "scores" if task.is_regression else f"{task.num_labels} classes{_listed(rows)}"
    mended = "give the labels of the rows the names that the head has"
    if names is None and model_config.num_labels == task.num_labels:
        names = held
        mended = (
            "nothing says which is which: name the classes of the head in id2label of the model's config.json, "
            "put their ids into the rows"
        )
    raise ConfigError(
        f"model.model_name_or_path: {model.model_name_or_path} has a head for {model_config.num_labels} classes"
        f"{_listed(names)}, but the rows have {found}; {mended}, or put a new head on the model with "
        "model.ignore_mismatched_sizes=true"
    )


def describe_labels(model_config: Any, task: Task, *, pad_token_id: int | None) -> None:
    """Write the task into a transformers configuration: label names, problem type, padding token."""
    names = task.label_names or [f"LABEL_{index}" for index in range(task.num_labels)]
    model_config.id2label = dict(enumerate(names))
    model_config.label2id = {name: index for index, name in enumerate(names)}
    model_config.problem_type = "regression" if task.is_regression else "single_label_classification"
    write_token(model_config, "pad", pad_token_id)


def require_end_token(model_config: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer that does not put the end token where a classifier expects it, after `follow_tokenizer`.

    Raises:
        ConfigError: the model answers at the end token, but texts do not end with one, are padded with it, or may
            contain more of them.
    """
    if model_config.model_type not in READ_THEIR_END:
        return
    end = tokenizer.eos_token_id
    if end is None or end not in tokenizer("a").input_ids:
        found = "puts none into its texts"
    elif end == tokenizer.pad_token_id:
        found = "also pads with it; set its pad_token to another token"
    elif not tokenizer.split_special_tokens:
        found = "also reads one from a text that spells it; leave out data.split_special_tokens=false"
    else:
        return
    raise ConfigError(
        f"model.tokenizer_name: a {model_config.model_type} classifier reads its answer at the end-of-text token, "
        f"but {type(tokenizer).__name__} {found}. Expected one in every row, at the end of its text"
    )


def _named(names: list[str]) -> list[str] | None:
    """Return the names of classes in order of their ids; None if they say nothing beyond the ids."""
    return None if _numbers(names) == list(range(len(names))) or names == TRUTH else names


def _numbers(names: list[str]) -> list[int] | None:
    """Return the numbers in class names (3, LABEL_3); None if a name has none, or two have the same."""
    found = [re.fullmatch(r"(?:label_)?([+-]?[0-9]+)", name.strip(), re.IGNORECASE) for name in names]
    numbers = [int(match[1]) for match in found if match]
    return numbers if len(set(numbers)) == len(names) else None


def _places_of_numbers(rows: list[int], held: list[int]) -> list[int] | None:
    """Return the position of each number of the rows in a head of numbered classes; None if it has other numbers.

    A head that only counts its classes from 0 has them in the order of their numbers, whatever the first one is.
    """
    order = sorted(rows) if held == list(range(len(held))) else held
    return [order.index(number) for number in rows] if sorted(rows) == sorted(order) else None


def _places(names: list[str], order: list[str]) -> list[int] | None:
    """Return the position of each name in the order; None if they are not the same names."""
    for spelt in (str, _plain):
        place = {spelt(name): number for number, name in enumerate(order)}
        found = [place[spelt(name)] for name in names if spelt(name) in place]
        if sorted(found) == list(range(len(order))):
            return found
    return None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()


def _listed(names: list[str] | None) -> str:
    return "" if not names else f" ({shortened(names)})"
