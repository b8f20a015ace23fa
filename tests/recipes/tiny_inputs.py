"""A model and rows small enough for a run of seconds."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizerFast,
)

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


def accuracy_of(folder: Path, rows: Path, *, model=None) -> float:
    """The accuracy of a saved folder, by nothing but transformers; of another model with its tokenizer."""
    model = model or AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with rows.open() as file:
        rows_read = list(csv.DictReader(file))
    with torch.no_grad():
        logits = model.eval()(
            **tokenizer([r["text"] for r in rows_read], padding=True, return_tensors="pt")
        ).logits
    labels = torch.tensor([int(r["label"]) for r in rows_read])
    return (logits.argmax(-1) == labels).double().mean().item()
