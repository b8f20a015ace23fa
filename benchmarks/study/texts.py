"""Text generation: an encoder-decoder, new or around the pretrained encoder, scored by loss per token and BLEU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.study import model as encoder
from benchmarks.study.outcomes import Prediction
from benchmarks.study.rows import Rows, evaluation_batches, padded

VOCABULARY = 2048
PAD, END = 0, 1
MAX_LENGTH = 64
"""Most tokens in a source, and in a target."""
IGNORED = -100
WIDTH, LAYERS, HEADS = 192, 3, 6
"""Sizes of the new parts: both halves of a new model, or the decoder of the pretrained encoder."""


@dataclass(frozen=True)
class Pairs(Rows):
    """Sources and targets. ``labels`` and ``segments`` are placeholders."""

    targets: tuple[tuple[int, ...], ...]
    """Token ids in the vocabulary of the targets, ``END`` last."""
    references: tuple[tuple[str, ...], ...]
    """Right texts, one or more per row."""

    def batch(self, places: Any) -> dict[str, Tensor]:
        """Keyword arguments of the model; ``labels`` (B, T), ``IGNORED`` after the end of a target."""
        rows = self.take(places)
        return rows.inputs() | {"labels": padded(rows.targets, IGNORED)}

    def inputs(self) -> dict[str, Tensor]:
        """Ids and mask (N, L), without token types: a new model has none."""
        return {name: tensor for name, tensor in super().inputs().items() if name != "token_type_ids"}


def read(sources: Sequence[str], targets: Sequence[str], *, split: str, source: Any, target: Any) -> Pairs:
    """Tokenize pairs of texts. Outside train, rows that share a source become one row with all their references.

    Args:
        sources: the texts to read.
        targets: the texts to generate.
        split: train, validation or test.
        source: tokenizes sources, from texts to token ids.
        target: the same for targets.
    """
    if split == "train":
        rows = [(one, [other]) for one, other in zip(sources, targets, strict=True)]
    else:
        grouped: dict[str, list[str]] = {}
        for one, other in zip(sources, targets, strict=True):
            grouped.setdefault(one, []).append(other)
        rows = list(grouped.items())
    return Pairs(
        ids=tuple(tuple(ids[:MAX_LENGTH]) for ids in source([one for one, _ in rows])),
        segments=((),) * len(rows),
        labels=torch.zeros(len(rows), dtype=torch.long),
        targets=tuple((*ids[: MAX_LENGTH - 1], END) for ids in target([others[0] for _, others in rows])),
        references=tuple(map(tuple, (others for _, others in rows))),
    )


def new_vocabulary(texts: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer with ``VOCABULARY`` tokens, trained on texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    found.train_from_iterator(texts, trainer)
    return found


def predict(model: nn.Module, rows: Pairs, vocabulary: Any) -> Prediction:
    """Logits (T, V) of every target token given the right ones before it; BLEU, from 0 to 1, of greedy search.

    Args:
        model: an encoder-decoder.
        rows: rows to score.
        vocabulary: tokenizer of the targets.
    """
    logits, labels = [], []
    with encoder.evaluating(model) as where:
        for places in evaluation_batches(rows):
            batch = {name: tensor.to(where) for name, tensor in rows.batch(places).items()}
            wanted = batch["labels"] != IGNORED
            logits.append(model(**batch).logits[wanted].float().cpu())
            labels.append(batch["labels"][wanted].cpu())
    return Prediction(
        torch.cat(logits),
        torch.cat(labels),
        scales=False,
        score=lambda: {"bleu": bleu(model, rows, vocabulary)},
    )


def bleu(model: nn.Module, rows: Pairs, vocabulary: Any) -> float:
    """Corpus BLEU, from 0 to 1, of greedy search, with all references of each source."""
    import sacrebleu

    found: dict[int, str] = {}
    with encoder.evaluating(model) as where:
        for places in evaluation_batches(rows):
            batch = {name: tensor.to(where) for name, tensor in rows.take(places).inputs().items()}
            ids = model.generate(**batch, max_new_tokens=MAX_LENGTH, do_sample=False, num_beams=1)
            found |= zip(places.tolist(), vocabulary.decode_batch(ids.tolist()), strict=True)
    most = max(map(len, rows.references))
    columns = [[right[i] if i < len(right) else None for right in rows.references] for i in range(most)]
    return sacrebleu.corpus_bleu([found[row] for row in range(len(rows))], columns).score / 100


def new_model(seed: int, device: torch.device, *, pretrained: bool) -> nn.Module:
    """A small T5 with random weights, or the pretrained encoder with a small new decoder.

    Args:
        seed: of the new weights.
        device: where it goes.
        pretrained: which of the two.
    """
    from transformers import (
        AutoModel,
        BertConfig,
        BertLMHeadModel,
        EncoderDecoderModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    special = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD, "bos_token_id": PAD}
    if pretrained:
        # EncoderDecoderModel masks padding in its decoder when it trains, but not when it generates.
        special["decoder_start_token_id"] = END
    else:
        torch.manual_seed(seed)
        config = T5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=4 * WIDTH, num_layers=LAYERS,
            num_heads=HEADS, attn_implementation=encoder.attention_on(device.type), **special,
        )  # fmt: skip
        return T5ForConditionalGeneration(config).to(device)
    body = encoder.from_pack(AutoModel, seed, device, add_pooling_layer=False)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH, is_decoder=True, add_cross_attention=True,
        max_position_embeddings=MAX_LENGTH + 2,
        pad_token_id=PAD, eos_token_id=END, bos_token_id=PAD,
        attn_implementation=encoder.attention_on(device.type),
    )  # fmt: skip
    model = EncoderDecoderModel(encoder=body, decoder=BertLMHeadModel(config))
    for holder in (model.config, model.generation_config):
        for name, value in special.items():
            setattr(holder, name, value)
    return model.to(device)
