"""What is put on a pretrained body: the head of a task, kept or new, its classes in order, and LoRA adapters."""

from __future__ import annotations

import logging
import re
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from swaft.errors import ConfigError
from swaft.training.config import AdapterConfig, ModelConfig
from swaft.training.config.values import split_names
from swaft.training.data.checks import shortened
from swaft.training.data.classification import TRUTH, Task

logger = logging.getLogger(__name__)


OTHER_HEADS = ("ForTokenClassification", "ForMultipleChoice")
"""Ends of architectures whose head may have the name of a classifier's, and would be loaded as one."""


@dataclass(frozen=True)
class FittedHead:
    """A task and the head that is to learn it."""

    task: Task
    """With its classes in the order of the head."""
    is_new: bool
    """Whether the head that the model brings is of no use, if it brings one; a body alone gets a new one anyway."""
    order: tuple[int, ...] | None = None
    """The rows' own id of each class, where the head has its own order."""


def fit_head(task: Task, model: ModelConfig, model_config: Any) -> FittedHead:
    """Bring the classes of a task into the order of the model's own head, where that is kept.

    A kept head knows each class by its place. Names say which is which, whatever their case, spaces, hyphens and
    underscores, and so do numbers (3, LABEL_3). Ids are taken to be the model's where one side has no names; texts
    are not, for nothing says which of them LABEL_0 is. Which order is used is logged. The configuration is as the
    model brings it.

    Raises:
        ConfigError: the head is for other classes, or another number of them, and no new one is asked for.
    """
    held = [str(name) for _, name in sorted((model_config.id2label or {}).items())]
    rows = task.label_names or [str(number) for number in range(task.num_labels)]
    names, own, architectures = _named(held), _named(rows), model_config.architectures or []
    # A configuration that names classes and no architecture is a classifier's of old.
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
        f"{_listed(names)}, and the rows have {found}; {mended}, or put a new head on the model with "
        "model.ignore_mismatched_sizes=true"
    )


@torch.no_grad()
def renew_head(model: Any) -> None:
    """Draw the weights of a classifier's head anew, whole or partitioned; torch is seeded alike on every rank."""
    heads = [model.get_submodule(name) for name in new_heads(model)]
    weights = [weight for head in heads for weight in head.parameters()]
    whole: Any = nullcontext()
    if any(hasattr(weight, "ds_id") for weight in weights):
        import deepspeed

        whole = deepspeed.zero.GatheredParameters(weights, modifier_rank=0)
    with whole:
        for weight in weights:
            weight._is_hf_initialized = False  # type: ignore[attr-defined]  # or transformers leaves it alone
        for head in heads:
            head.apply(model._init_weights)


def _named(names: list[str]) -> list[str] | None:
    """Return the names of classes in order of their ids; None where they say nothing but the ids."""
    return None if _numbers(names) == list(range(len(names))) or names == TRUTH else names


def _numbers(names: list[str]) -> list[int] | None:
    """Return the numbers that classes are called by (3, LABEL_3); None where one has none, or two the same."""
    found = [re.fullmatch(r"(?:label_)?([+-]?[0-9]+)", name.strip(), re.IGNORECASE) for name in names]
    numbers = [int(match[1]) for match in found if match]
    return numbers if len(set(numbers)) == len(names) else None


def _places_of_numbers(rows: list[int], held: list[int]) -> list[int] | None:
    """Return the place of each number of the rows in a head of numbered classes; None where it has other numbers.

    A head that only counts its classes from 0 has them in the order of their numbers, wherever those begin.
    """
    order = sorted(rows) if held == list(range(len(held))) else held
    return [order.index(number) for number in rows] if sorted(rows) == sorted(order) else None


def _places(names: list[str], order: list[str]) -> list[int] | None:
    """Return the place of each name in the order; None where they are not the same names."""
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


TASK_TYPES = {
    "sequence classification": "SEQ_CLS",
    "question answering": "QUESTION_ANS",
    "sequence to sequence": "SEQ_2_SEQ_LM",
    "causal language modelling": "CAUSAL_LM",
}
"""What peft calls the tasks of the recipes."""


def with_adapters(model: Any, settings: AdapterConfig, *, task: str) -> Any:
    """Return the model with LoRA adapters, where the settings ask for them, or as it is.

    Nothing of the pretrained model is trained then. A head that the task has added to it is, whole, and goes into
    the adapter's folder. The model is whole, and torch is seeded alike on every rank.

    Raises:
        ConfigError: peft is not installed, or finds none of the layers.
    """
    if not settings.use_peft:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(f"model.use_peft: needs peft: pip install 'swaft[peft]' ({error})") from error
    heads = new_heads(model) if task in ("sequence classification", "question answering") else []
    names = settings.lora_target_modules
    wanted = LoraConfig(
        task_type=TASK_TYPES[task],
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=names if names in (None, "all-linear") else split_names(names),
        modules_to_save=heads or None,
    )
    try:
        with warnings.catch_warnings():
            # peft 0.21 asks for checkpointing by a name that transformers 5.23 has deprecated.
            warnings.filterwarnings("ignore", category=FutureWarning, message="`is_gradient_checkpointing`")
            return get_peft_model(model, wanted)
    except ValueError as error:
        linear = {name.split(".")[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        raise ConfigError(
            f"model.lora_target_modules: {names or 'null'} fits no layer of {type(model).__name__}; expected "
            f"all-linear, or some of {', '.join(sorted(linear))} ({' '.join(str(error).split())[:200]})"
        ) from error


def new_heads(model: Any) -> list[str]:
    """Names of the parts with weights that the task has put on the pretrained body.

    Some models have no body of one piece: embeddings, encoder and decoder lie beside the head (T5's for questions).
    """

    def is_of_the_body(part: nn.Module) -> bool:
        if model.base_model is model:
            return isinstance(part, PreTrainedModel | nn.Embedding)
        return part is model.base_model

    return [
        name
        for name, part in model.named_children()
        if not is_of_the_body(part) and any(True for _ in part.parameters())
    ]
