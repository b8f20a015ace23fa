"""A classifier that is trained further keeps its head in its own order, or gets a new one, or is refused."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from swaft.errors import ConfigError
from swaft.training.config import ModelConfig, TrainConfig
from swaft.training.data.classification import ClassificationConfig, DataConfig, Task, describe_task
from swaft.training.metrics import get_metric, renumbered
from swaft.training.models.classes import FittedHead, describe_labels, fit_head
from swaft.training.models.pretrained import load_model_config, load_with_head

pytestmark = pytest.mark.unit

SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 16,
}
MNLI = ["CONTRADICTION", "neutral", "entail_ment"]


def task_of(labels: list, names: list[str] | None = None) -> Task:
    columns: dict[str, list] = {"text": ["a"] * len(labels), "label": labels}
    features = (
        None if names is None else Features({"text": Value("string"), "label": ClassLabel(names=names)})
    )
    return describe_task({"train": Dataset.from_dict(columns, features=features)}, DataConfig())


@pytest.fixture
def saved(tmp_path):
    """Save a model with a head for these classes; returns its section."""

    def save(names: list[str] | int, kind: Any = BertForSequenceClassification) -> ModelConfig:
        config = kind.config_class(**SIZES)
        if isinstance(names, int):
            config.num_labels = names
        else:
            config.id2label = dict(enumerate(names))
        model = kind(config)
        torch.nn.init.ones_(
            model.classifier.weight if hasattr(model, "classifier") else model.pooler.dense.weight
        )
        model.save_pretrained(tmp_path / "model")
        return ModelConfig(model_name_or_path=str(tmp_path / "model"))

    return save


def load(model: ModelConfig, task: Task) -> tuple[FittedHead, Any]:
    config = load_model_config(model)
    head = fit_head(task, model, config)
    describe_labels(config, head.task, pad_token_id=0)
    settings = ClassificationConfig(model=model, train=TrainConfig(output_dir="unused", seed=0))
    return head, load_with_head(settings, config, has_new_head=head.is_new)


def is_kept(model: Any) -> bool:
    return bool((model.classifier.weight == 1).all())


@pytest.mark.parametrize(
    ("task", "ids", "order"),
    [
        (task_of([0, 1, 2], ["entailment", "Neutral", "contradiction"]), {0: 2, 1: 1, 2: 0}, (2, 1, 0)),
        (
            task_of(["entail ment", "NEUTRAL", "contradiction"]),
            {"entail ment": 2, "NEUTRAL": 1, "contradiction": 0},
            (1, 0, 2),
        ),
        (
            task_of(["entail-ment", "neutral", "Contradiction"]),
            {"entail-ment": 2, "neutral": 1, "Contradiction": 0},
            (0, 2, 1),
        ),
    ],
)
def test_classes_of_the_same_names_are_taken_in_the_order_of_the_head(saved, task, ids, order, caplog):
    with caplog.at_level(logging.INFO, logger="swaft"):
        head, model = load(saved(MNLI), task)
    assert is_kept(model)
    assert model.config.id2label == dict(enumerate(MNLI))
    assert (head.task.label_ids, head.order) == (ids, order)
    assert (
        "the model keeps its head; classes are in its order (CONTRADICTION, neutral, entail_ment)"
        in caplog.text
    )


def test_the_f1_stays_that_of_the_class_which_the_rows_call_1(saved):
    head, _ = load(saved(["yes", "no"]), task_of([0, 1], ["no", "yes"]))
    metric = renumbered(get_metric("f1"), head.order or ())
    said, right = np.array([1, 0, 1, 1]), np.array([0, 0, 1, 1])  # as the head has it: 0 is yes
    assert metric.compute(said, right) == get_metric("f1").compute(1 - said, 1 - right) == {"f1": 2 / 3}


@pytest.mark.parametrize("names", [["0", "1"], ["LABEL_0", "LABEL_1"]])
def test_names_that_say_the_id_are_none(saved, names):
    head, _ = load(saved(["yes", "no"]), task_of([0, 1], names))
    assert (head.task.label_names, head.order) == (["yes", "no"], None)
    head, _ = load(saved(names), task_of([0, 1], ["no", "yes"]))
    assert (head.task.label_names, head.order) == (["no", "yes"], None)


@pytest.mark.parametrize("spelt", ["{}", "LABEL_{}", "label_{}"])
def test_numbered_classes_are_taken_by_their_numbers(saved, spelt):
    task = task_of([spelt.format(number) for number in range(12)])
    head, model = load(saved(12), task)
    assert head.task.label_ids == {spelt.format(number): number for number in range(12)}
    assert model.config.id2label[10] == spelt.format(10)
    head, _ = load(saved(["2", "0", "1"]), task_of([0, 1, 2]))
    assert (head.task.label_ids, head.order) == ({0: 1, 1: 2, 2: 0}, (2, 0, 1))
    head, _ = load(saved(12), task_of([str(number) for number in range(1, 13)]))
    assert head.task.label_ids["12"] == 11


def test_numbers_that_the_head_does_not_have_are_refused(saved):
    with pytest.raises(ConfigError, match=r"2 classes \(1, 2\), but the rows have 2 classes \(0, 1\)"):
        load(saved(["1", "2"]), task_of([0, 1]))


def test_truth_values_are_taken_by_name_and_else_by_their_ids(saved):
    head, _ = load(saved(["true", "false"]), task_of([True, False]))
    assert head.task.label_ids == {0: 1, 1: 0}
    head, _ = load(saved(["no", "yes"]), task_of([True, False]))
    assert (head.task.label_ids, head.task.label_names) == ({0: 0, 1: 1}, ["no", "yes"])


def test_names_that_differ_only_in_spelling_are_told_apart_exactly(saved):
    head, _ = load(saved(["a_b", "ab"]), task_of(["ab", "a_b"]))
    assert head.task.label_ids == {"ab": 1, "a_b": 0}


@pytest.mark.parametrize("names", [MNLI, 3])
def test_classes_without_names_are_taken_by_their_ids(saved, names, caplog):
    task = task_of([0, 1, 2]) if names is MNLI else task_of([0, 1, 2], ["c", "a", "b"])
    with caplog.at_level(logging.INFO, logger="swaft"):
        head, model = load(saved(names), task)
    assert is_kept(model)
    assert list(model.config.id2label.values()) == (MNLI if names is MNLI else ["c", "a", "b"])
    assert head.task.label_ids == task.label_ids
    assert "class ids are taken as they are (" in caplog.text


@pytest.mark.parametrize("names", [3, ["0", "1", "2"]])
def test_rows_with_texts_do_not_guess_what_a_head_without_names_has_learnt(saved, names):
    section, task = saved(names), task_of(["entailment", "neutral", "contradiction"])
    with pytest.raises(
        ConfigError,
        match=r"3 classes \((LABEL_)?0, .*3 classes \(contradiction, entailment, neutral\); nothing says which is "
        r"which: .*id2label .*config.json, .*ids into the rows, or .*model\.ignore_mismatched_sizes=true",
    ):
        load(section, task)
    section.ignore_mismatched_sizes = True
    head, model = load(section, task)
    assert head.is_new
    assert not is_kept(model)
    assert list(model.config.id2label.values()) == task.label_names


@pytest.mark.parametrize(
    ("names", "task", "said"),
    [
        (
            MNLI,
            task_of(["sad", "glad", "mad"]),
            r"3 classes \(CONTRADICTION, .*\), but the rows have 3 classes \(glad",
        ),
        (
            MNLI,
            task_of(["neutral", "contradiction"]),
            r"3 classes .* the rows have 2 classes \(contradiction, neutral",
        ),
        (
            ["1 star", "2 stars"],
            task_of([1, 2]),
            r"2 classes \(1 star, 2 stars\), but the rows have 2 classes \(1, 2\)",
        ),
        (2, task_of([0.5, 1.0]), "has a head for 2 classes, but the rows have scores"),
        (1, task_of([0, 1]), "has a head for 1 classes, but the rows have 2 classes"),
    ],
)
def test_a_head_for_other_classes_is_refused_and_renewed_when_asked(saved, names, task, said):
    section = saved(names)
    with pytest.raises(ConfigError, match=said + r".*model\.ignore_mismatched_sizes=true"):
        load(section, task)
    section.ignore_mismatched_sizes = True
    _, model = load(section, task)
    _, again = load(section, task)
    assert model.num_labels == task.num_labels
    assert 0 < model.classifier.weight.std() < 0.1
    assert torch.equal(model.classifier.weight, again.classifier.weight)


def test_a_head_of_several_layers_is_renewed_whole(tmp_path):
    config = RobertaConfig(**SIZES, id2label=dict(enumerate(MNLI)))
    before = RobertaForSequenceClassification(config)
    torch.nn.init.ones_(before.classifier.dense.weight)
    torch.nn.init.ones_(before.classifier.out_proj.bias)
    before.save_pretrained(tmp_path)
    section = ModelConfig(model_name_or_path=str(tmp_path), ignore_mismatched_sizes=True)
    _, model = load(section, task_of(["sad", "glad", "mad"]))
    assert not (model.classifier.dense.weight == 1).any()
    assert not model.classifier.out_proj.bias.any()
    assert torch.equal(
        model.roberta.embeddings.word_embeddings.weight, before.roberta.embeddings.word_embeddings.weight
    )


def test_a_head_for_scores_is_kept_for_scores(saved):
    assert is_kept(load(saved(1), task_of([0.5, 1.0]))[1])


@pytest.mark.parametrize("names", [2, 5, ["B-PER", "O"]])
def test_a_head_for_tokens_is_no_head_for_texts(saved, names):
    head, model = load(saved(names, BertForTokenClassification), task_of(["no", "yes"]))
    assert head.is_new
    assert not is_kept(model)


def test_a_body_without_a_head_gets_one_whatever_its_configuration_names(saved):
    head, model = load(saved(["x", "y"], BertModel), task_of(["no", "yes"]))
    assert not head.is_new
    assert model.config.id2label == {0: "no", 1: "yes"}


def test_a_configuration_of_old_that_names_classes_and_no_architecture_has_a_head():
    config = BertConfig(**SIZES, id2label={0: "yes", 1: "no"})
    assert config.architectures is None
    head = fit_head(task_of(["no", "yes"]), ModelConfig(model_name_or_path="unused"), config)
    assert head.task.label_names == ["yes", "no"]
