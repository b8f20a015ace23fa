"""Questions that a tiny encoder learns to answer in seconds, some of them longer than its windows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

COLOURS = ["red", "blue", "green", "black"]
ANIMALS = ["cat", "dog", "bird", "horse"]
FILLERS = ["a", "the", "here", "there", "now", "again", "still"]
KINDS = {"colour": COLOURS, "animal": ANIMALS}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "which", "?", *KINDS, *COLOURS, *ANIMALS, *FILLERS]


def make_questions(count: int, *, seed: int, unanswerable: float = 0.0) -> list[dict[str, Any]]:
    """Rows in SQuAD's schema: which colour, or which animal, stands among words that are neither."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        kind = draw.choice(list(KINDS))
        words = draw.choices(FILLERS, k=draw.randint(4, 24))
        told = {name: draw.choice(known) for name, known in KINDS.items()}
        if draw.random() < unanswerable:
            del told[kind]
        for word in told.values():
            words.insert(draw.randrange(len(words) + 1), word)
        context = " ".join(words)
        right = [told[kind]] if kind in told else []
        rows.append(
            {
                "id": f"q{seed}-{number}",
                "question": f"which {kind}?",
                "context": context,
                "answers": {"text": right, "answer_start": [context.index(word) for word in right]},
            }
        )
    return rows


def save_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """A jsonl file of them."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def save_questions(path: Path, count: int, *, seed: int, unanswerable: float = 0.0) -> str:
    """A jsonl file of `make_questions`."""
    return save_rows(path, make_questions(count, seed=seed, unanswerable=unanswerable))


def save_reader(folder: Path) -> str:
    """A BERT of two thin layers with a tokenizer that knows whole words."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    BertTokenizerFast(vocab=vocabulary, model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)
    BertModel(config).save_pretrained(folder)
    return str(folder)
