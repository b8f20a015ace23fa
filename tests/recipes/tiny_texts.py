"""Pairs of texts that a tiny encoder-decoder learns to map in seconds."""

from __future__ import annotations

import csv
import itertools
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertTokenizer,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES
from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES as FIFTY_CODES

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


def save_encoder_decoder(
    folder: Path, *, decoder_start_token_id: int | None = 0, special: dict[str, str] | None = None
) -> str:
    """A T5 of one thin layer with a tokenizer that knows whole words, and says which of them are special."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", "a", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"} if special is None else special
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
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


def save_decoder(folder: Path) -> str:
    """A GPT-2 of one thin layer, with the same words."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", "a", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(vocabulary), n_embd=16, n_layer=1, n_head=2, n_positions=32, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def save_two_berts(folder: Path, **entries: Any) -> str:
    """An encoder-decoder made of two BERTs, whose tokenizer ends texts with a separator and knows no other end."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", *WORDS])}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"vocab_size": len(vocabulary), "max_position_embeddings": 32}
    decoder = BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**sizes), decoder, **entries)
    EncoderDecoderModel(config).save_pretrained(folder)
    return str(folder)


def language_tokenizer(kind: str) -> Any:
    """A tokenizer of many languages: mbart and mbart50 know whole words, nllb letters."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    if kind == "nllb":
        letters = sorted({"▁", *"".join(WORDS), "a"})
        return NllbTokenizer(
            vocab={token: index for index, token in enumerate([*special, *letters])}, merges=[]
        )
    made, codes = {
        "mbart": (MBartTokenizer, FAIRSEQ_LANGUAGE_CODES),
        "mbart50": (MBart50Tokenizer, FIFTY_CODES),
    }[kind]
    words = [(f"▁{word}", -1.0) for word in ("a", *WORDS)]
    pieces = [*((token, 0.0) for token in special), ("▁", -2.0), *words, *((code, 0.0) for code in codes)]
    return made(vocab=[*pieces, ("<mask>", 0.0)])
