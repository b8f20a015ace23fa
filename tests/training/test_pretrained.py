from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Gemma3Config, LayoutLMv3Tokenizer
from transformers.utils import is_sentencepiece_available

from swaft.errors import ConfigError
from swaft.training.config import ModelConfig, TrainConfig
from swaft.training.data.classification import ClassificationConfig, Task
from swaft.training.models.classes import describe_labels
from swaft.training.models.pretrained import (
    Preprocessing,
    hidden_size,
    load_model_config,
    load_tokenizer,
    load_with_head,
    processor_files,
)

pytestmark = pytest.mark.unit


def load_classifier(model: ModelConfig, config: BertConfig, **train: Any) -> Any:
    train_config = TrainConfig(output_dir="unused", **train)
    return load_with_head(ClassificationConfig(model=model, train=train_config), config)


def tiny_config() -> BertConfig:
    return BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
    )


def task(**changes) -> Task:
    fields = {"text_columns": ("text",), "label_column": "label", "num_labels": 3, "label_names": None}
    return Task(**(fields | {"is_regression": False, "label_ids": {}, "rows": {}} | changes))


@pytest.fixture
def model(tmp_path) -> ModelConfig:
    from transformers import BertModel

    BertModel(tiny_config()).save_pretrained(tmp_path / "model")
    return ModelConfig(model_name_or_path=str(tmp_path / "model"))


@pytest.mark.skipif(is_sentencepiece_available(), reason="sentencepiece is installed")
def test_a_tokenizer_of_sentencepiece_alone_names_the_package_that_it_needs(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "deberta-v2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"vocab_type": "spm"}')
    (tmp_path / "spm.model").write_bytes(b"\n\x0e\n\x05[PAD]\x15")
    with pytest.raises(
        ConfigError, match=r"model\.model_name_or_path: .* pip install sentencepiece protobuf"
    ):
        load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)))


def test_the_labels_of_the_task_are_written_into_the_configuration():
    config = tiny_config()
    describe_labels(config, task(label_names=["no", "maybe", "yes"]), pad_token_id=0)
    assert config.num_labels == 3
    assert config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert config.label2id["yes"] == 2
    assert config.problem_type == "single_label_classification"


def test_a_regression_has_one_output():
    config = tiny_config()
    describe_labels(config, task(num_labels=1, is_regression=True), pad_token_id=0)
    assert (config.num_labels, config.problem_type) == (1, "regression")


def test_the_new_head_is_the_same_wherever_the_generator_stands(model):
    config = load_model_config(model)
    describe_labels(config, task(), pad_token_id=0)
    first = load_classifier(model, config, seed=3, gradient_checkpointing=False)
    torch.rand(7)
    second = load_classifier(model, config, seed=3, gradient_checkpointing=True)
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert first.classifier.weight.shape == (3, 8)
    assert first.dtype == torch.float32
    assert second.is_gradient_checkpointing


def test_a_model_that_brings_code_is_refused_and_the_setting_is_named(tmp_path):
    content = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "configuration_mine.MyConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code=true"):
        load_model_config(ModelConfig(model_name_or_path=str(tmp_path)))


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.model_name_or_path: .*nowhere"):
        load_model_config(ModelConfig(model_name_or_path=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("load", [load_model_config, load_tokenizer])
def test_a_folder_that_is_no_whole_model_is_told_for_what_it_is(tmp_path, load):
    section = ModelConfig(model_name_or_path=str(tmp_path))  # a run's own folder, say
    with pytest.raises(ConfigError, match=r"it has no config\.json; expected the folder of a model"):
        load(section)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="it is an adapter; merge it into its base model"):
        load(section)


def test_a_tokenizer_that_is_not_there_is_named(tmp_path):
    section = ModelConfig(model_name_or_path="demo", tokenizer_name=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"model\.tokenizer_name: .*nowhere cannot be loaded"):
        load_tokenizer(section)


def test_the_width_is_read_where_the_configuration_says_it():
    assert hidden_size(tiny_config()) == 8
    assert hidden_size(SimpleNamespace()) is None


def test_a_head_for_another_number_of_classes_is_replaced_only_when_asked(tmp_path):
    config = tiny_config()
    config.num_labels = 5
    BertForSequenceClassification(config).save_pretrained(tmp_path / "fine-tuned")
    settings = {"num_labels": 2}
    model = ModelConfig(model_name_or_path=str(tmp_path / "fine-tuned"))
    with pytest.raises(ConfigError, match=r"head of another size.*model\.ignore_mismatched_sizes=true"):
        load_classifier(model, load_model_config(model, **settings))
    model.ignore_mismatched_sizes = True
    loaded = load_classifier(model, load_model_config(model, **settings))
    assert loaded.classifier.out_features == 2


def test_a_folder_without_a_tokenizer_is_refused_rather_than_read_as_unknown_words(model):
    with pytest.raises(ConfigError, match=r"model.tokenizer_name: .*model has no vocabulary"):
        load_tokenizer(model)


@pytest.mark.parametrize(
    "model_type", ["t5", "mbart", "deberta-v2", "llama", "modernbert", "marian", "ctrl", "prophetnet"]
)
def test_a_model_saved_without_its_tokenizer_is_told_so_by_every_type(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(
        ConfigError, match=r"model\.tokenizer_name: .* has no vocabulary, which tokenizer\.json"
    ):
        load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)))


def test_a_tokenizer_of_bytes_needs_no_files(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "canine"}')
    assert load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)))("a")["input_ids"] == [
        57344,
        97,
        57345,
    ]


def test_a_multimodal_model_keeps_the_settings_that_prepare_its_images(tmp_path, caplog):
    base, trained = tmp_path / "base", tmp_path / "trained"
    base.mkdir()
    trained.mkdir()
    (base / "preprocessor_config.json").write_text('{"size": 896}')
    named = ModelConfig(model_name_or_path=str(base))
    tokenizer: Any = SimpleNamespace(
        save_pretrained=lambda folder: (folder / "tokenizer.json").write_text("{}")
    )
    Preprocessing(tokenizer, processor_files(named, Gemma3Config())).save_pretrained(trained)
    assert {path.name for path in trained.iterdir()} == {"preprocessor_config.json", "tokenizer.json"}
    assert (trained / "preprocessor_config.json").read_text() == '{"size": 896}'
    assert processor_files(named, BertConfig()) == []
    assert not caplog.messages
    (base / "preprocessor_config.json").unlink()
    assert processor_files(named, Gemma3Config()) == []
    assert "its settings for images and sound (processor_config.json, " in caplog.text


def test_a_tokenizer_of_pages_is_refused(tmp_path):
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b"]
    vocabulary = {word: index for index, word in enumerate(words)}
    LayoutLMv3Tokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"model\.tokenizer_name: LayoutLMv3Tokenizer does not read plain text"
    ):
        load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)))
