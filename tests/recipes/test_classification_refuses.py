from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from tiny_inputs import save_model, save_rows
from transformers import AutoConfig, BertForSequenceClassification

from swaft.cli.main import main
from swaft.training.checks import Problems
from swaft.training.config import load_config

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.recipe, pytest.mark.usefixtures("fresh_accelerate")]


@pytest.fixture
def refuse(refusal, classification, inputs):
    """Call the recipe with overrides, see it fail in words, and return the words."""
    return partial(refusal, classification, inputs)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("eval.metric=bleu", "eval.metric: bleu does not fit a classification"),
        ("train.learning_rate=-1", "train.learning_rate"),
        ("noise.sigma=0.1", "noise.sigma: is 0.1, which noise.kind=none does not use"),
    ],
)
def test_a_setting_that_cannot_work_is_named(refuse, override, expected):
    assert expected in refuse(override)


def test_a_score_that_there_is_not_is_named_before_the_model_is_loaded(classification, inputs):
    given = ("averaging.rule=windows", "eval.metric_for_best_model=f2", "eval.metric=accuracy")
    config = load_config(classification.Config, ["--config", str(inputs / "run.yaml"), *given])
    problems = Problems()
    classification.prepare(config, problems)
    [problem] = problems.found
    assert "this run has no score 'f2' to choose weights by; expected one of accuracy" in problem


@pytest.mark.parametrize(
    ("rows", "metric"),
    [
        (("data.dataset_name=nyu-mll/glue", "data.dataset_config_name=cola"), "matthews_correlation"),
        (("data.dataset_name=glue", "data.dataset_config_name=mrpc"), "accuracy_f1"),
        (("data.task_name=qqp",), "accuracy_f1"),
        (("data.dataset_name=mine/glue", "data.dataset_config_name=cola"), "accuracy"),
    ],
)
def test_a_task_of_glue_has_its_metric_however_it_is_named(classification, inputs, rows, metric):
    config = load_config(classification.Config, ["--config", str(inputs / "run.yaml"), *rows])
    task = SimpleNamespace(is_regression=False, num_labels=2, label_names=("no", "yes"))
    assert classification.choose_metric(config, task).name == metric


def test_the_metric_follows_a_kept_head_whose_order_is_another(classification, tmp_path):
    folder = Path(save_model(tmp_path / "model"))
    named = AutoConfig.from_pretrained(folder, id2label={0: "yes", 1: "no"})
    BertForSequenceClassification.from_pretrained(folder, config=named).save_pretrained(folder)
    sets = [
        f"model.model_name_or_path={folder}",
        "data.max_seq_length=16",
        "eval.metric=f1",
        f"train.output_dir={tmp_path / 'out'}",
    ]
    for split in ("train", "validation"):
        file = tmp_path / f"{split}.csv"
        save_rows(file, 20, seed=1, label=lambda positive: "yes" if positive else "no")
        sets.append(f"data.{split}_file={file}")
    problems = Problems()
    ready = classification.prepare(load_config(classification.Config, sets), problems)
    assert problems.found == []
    assert ready.head.order == (1, 0)
    said, right = np.array([0, 1, 0]), np.array([0, 1, 1])  # "yes", the second of the rows, is 0 of the head
    assert ready.metric.compute(said, right) == {"f1": 2 / 3}


def test_a_head_for_other_classes_is_refused_by_the_run_as_by_validate(refuse, tmp_path, capsys):
    folder = Path(save_model(tmp_path / "model"))
    config = AutoConfig.from_pretrained(folder, id2label={0: "spam", 1: "ham"})
    BertForSequenceClassification.from_pretrained(folder, config=config).save_pretrained(folder)
    rows = save_rows(tmp_path / "train.csv", 8, seed=1, label=lambda positive: "yes" if positive else "no")
    given = (f"model.model_name_or_path={folder}", f"data.train_file={rows}")
    said = f"{folder} has a head for 2 classes (spam, ham), but the rows have 2 classes (no, yes)"
    assert said in refuse(*given)
    single = ROOT / "launch" / "accelerate" / "single.yaml"
    recipe = ROOT / "recipes" / "classification.py"
    settings = (*given, f"train.output_dir={tmp_path / 'out'}")
    assert main(["validate", "--config_file", str(single), str(recipe), *settings]) == 1
    assert said in capsys.readouterr().out


def test_rows_that_cannot_be_used_are_named(refuse, tmp_path):
    Dataset.from_dict({"text": ["a", None], "label": [0, 1]}).to_parquet(str(tmp_path / "test.parquet"))
    assert "row 2 of test has nothing in column 'text'" in refuse(
        f"data.test_file={tmp_path / 'test.parquet'}"
    )


def test_more_tokens_than_a_model_has_positions_are_refused_where_its_tokenizer_does_not_say(
    refuse, tmp_path
):
    folder = save_model(tmp_path / "model")
    settings = Path(folder) / "tokenizer_config.json"
    said = json.loads(settings.read_text())
    del said["model_max_length"]
    settings.write_text(json.dumps(said))
    refused = refuse(f"model.model_name_or_path={folder}", "data.max_seq_length=64")
    assert "data.max_seq_length is 64, but the model reads at most 32 tokens" in refused


def test_a_tokenizer_with_neither_padding_nor_an_end_is_refused(refuse, tmp_path):
    folder = save_model(tmp_path / "model")
    settings = Path(folder) / "tokenizer_config.json"
    said = json.loads(settings.read_text())
    assert not said.get("eos_token")
    settings.write_text(json.dumps(said | {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": None}))
    assert "has no padding token" in refuse(f"model.model_name_or_path={folder}")


def test_a_nan_loss_names_the_step(refuse, tmp_path):
    poisoned = save_model(tmp_path / "model", nan_word="the")
    said = refuse(f"model.model_name_or_path={poisoned}", "averaging.rule=none")
    assert "the loss of optimizer step 1 is not finite" in said
