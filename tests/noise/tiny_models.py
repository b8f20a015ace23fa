"""Random Hugging Face models of a few thousand weights, and batches for them."""

from __future__ import annotations

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 60


def bert(*, dropout: float = 0.1, num_labels: int = 3, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(_encoder_config(BertConfig, dropout, num_labels)).train()


def roberta(*, dropout: float = 0.1, num_labels: int = 3, seed: int = 0) -> RobertaForSequenceClassification:
    torch.manual_seed(seed)
    return RobertaForSequenceClassification(_encoder_config(RobertaConfig, dropout, num_labels)).train()


def bart(kind: type = BartForConditionalGeneration, *, dropout: float = 0.1, seed: int = 0):
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        dropout=dropout,
        num_labels=3,
    )
    return kind(config).train()


def bart_classifier() -> BartForSequenceClassification:
    return bart(BartForSequenceClassification)


def t5(*, dropout: float = 0.1, seed: int = 0) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        dropout_rate=dropout,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).train()


def classification_batch(*, rows: int = 4, num_labels: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(4, VOCABULARY, (rows, 8), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, 5:] = 0
    input_ids[0, 5:] = 1
    input_ids[:, -1] = 2  # BART reads the answer off its end-of-sequence token, one in every row
    labels = torch.randint(0, num_labels, (rows,), generator=generator)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def generation_batch(*, rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    batch = classification_batch(rows=rows, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(4, VOCABULARY, (rows, 6), generator=generator)
    labels[0, 4:] = -100
    return {**batch, "labels": labels}


def _encoder_config(kind: type, dropout: float, num_labels: int):
    return kind(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=num_labels,
    )
