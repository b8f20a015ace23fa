from __future__ import annotations

import csv
import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
from launching import ROOT
from transformers import BertConfig, BertModel, BertTokenizerFast

POSITIVE, NEGATIVE = ["good", "fine"], ["bad", "awful"]
SUBJECTS, DEGREES = ["movie", "film", "plot"], ["very", "truly"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "the", "was", *POSITIVE, *NEGATIVE, *SUBJECTS, *DEGREES]


def save_model(folder: Path, *, nan_word: str | None = None) -> str:
    """A BERT of two thin layers with a WordPiece tokenizer of its own; a word may have a NaN embedding."""
    folder.mkdir(parents=True)
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    BertTokenizerFast(vocab=vocabulary, model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
        )
    )
    if nan_word:
        model.embeddings.word_embeddings.weight.data[WORDS.index(nan_word)] = float("nan")
    model.save_pretrained(folder)
    return str(folder)


def save_rows(path: Path, count: int, *, seed: int, label=lambda positive: int(positive)) -> str:
    """Sentences whose label follows from one word."""
    draw = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(count):
            positive = draw.random() < 0.5
            words = [draw.choice(SUBJECTS), "was", draw.choice(DEGREES)]
            writer.writerow(
                [
                    "the " + " ".join([*words, draw.choice(POSITIVE if positive else NEGATIVE)]),
                    label(positive),
                ]
            )
    return str(path)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A folder with a model, data, and a configuration that names them."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model")
    save_rows(folder / "train.csv", 70, seed=1)  # neither 70 nor 23 nor 11 is a multiple of any batch
    save_rows(folder / "validation.csv", 23, seed=2)
    save_rows(folder / "test.csv", 11, seed=3)
    (folder / "run.yaml").write_text(
        f"""\
model: {{model_name_or_path: {folder / "model"}}}
data:
  train_file: {folder / "train.csv"}
  validation_file: {folder / "validation.csv"}
  test_file: {folder / "test.csv"}
  max_seq_length: 16
train:
  output_dir: {folder / "unused"}
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 2
  num_train_epochs: 6
  learning_rate: 5.0e-3
  logging_steps: 3
averaging: {{rule: swa}}
eval: {{per_device_eval_batch_size: 4, eval_steps: 10}}
"""
    )
    return folder


@pytest.fixture(scope="session")
def classification() -> ModuleType:
    """The recipe as a module, to call its `main` in this process."""
    path = ROOT / "recipes" / "classification.py"
    spec = importlib.util.spec_from_file_location("classification_recipe", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
