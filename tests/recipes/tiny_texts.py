"""Pairs of texts that a tiny encoder-decoder learns to map in seconds."""

from __future__ import annotations

import csv
import itertools
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

COLOURS = {"red": "rouge", "blue": "bleu clair", "green": "vert", "black": "noir de jais"}
ANIMALS = {"cat": "chat", "dog": "chien", "bird": "oiseau", "horse": "cheval", "cow": "vache", "hen": "poule"}
ENDINGS = ["", " here", " there", " now", " again"]
TEXTS = [*COLOURS, *ANIMALS, *COLOURS.values(), *ANIMALS.values()]
WORDS = sorted({word for text in TEXTS for word in text.split()})

NEW_MODEL = (
    "{model_type: t5, d_model: 32, d_kv: 16, d_ff: 64, num_layers: 1, num_heads: 2, dropout_rate: 0.0}"
)


def save_pairs(path: Path, count: int, *, seed: int, target=lambda text: text) -> str:
    """Different sources, each with its one right text: the animal, then its colour."""
    possible = [
        (f"a {colour} {animal}{ending}", f"{ANIMALS[animal]} {COLOURS[colour]}")
        for colour, animal, ending in itertools.product(COLOURS, ANIMALS, ENDINGS)
    ]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["source", "target"])
        writer.writerows(
            (source, target(right)) for source, right in random.Random(seed).sample(possible, count)
        )
    return str(path)


def save_encoder_decoder(folder: Path, *, decoder_start_token_id: int | None = 0) -> str:
    """A T5 of one thin layer with a tokenizer that knows whole words."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", "a", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=decoder_start_token_id,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)
