"""Evaluates generated texts, and how likely a model finds the right ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from swaft.training.config.causal_lm import CausalDataConfig, CausalEvalConfig
from swaft.training.config.seq2seq import Seq2SeqDataConfig, Seq2SeqEvalConfig
from swaft.training.data.texts import IGNORED
from swaft.training.evaluation.evaluate import (
    ROW_ID,
    Evaluation,
    Ragged,
    measured_once,
    require_finite,
    without_row_id,
)
from swaft.training.metrics.names import Metric


def evaluate_texts(
    model: nn.Module,
    loader: DataLoader[Any],
    accelerator: Accelerator,
    *,
    references: Sequence[Sequence[str]],
    tokenizer: Any,
    metric: Metric | None,
    generation: Mapping[str, Any],
) -> Evaluation:
    """Return the loss a token and the scores of generated texts over a data set (collective).

    The ``loss`` is the plain cross entropy, summed over all target tokens and divided by their number, so it
    depends neither on batch size nor on ranks. ``gen_len`` is the mean length of what was generated, in tokens,
    without the one that the decoder starts with.

    Args:
        model: as prepared; left in the mode it was found in.
        loader: prepared loader of batches with ``labels`` (B, T) and ``idx`` (B,), row numbers from 0.
        accelerator: that prepared both.
        references: right texts of each row, by row number.
        tokenizer: turns tokens into text.
        metric: scores texts against references; None: the loss alone, nothing is generated.
        generation: arguments of the model's ``generate``, such as ``num_beams``.

    Raises:
        TrainingError: where rows are missing, or the loss is not finite; on every rank.
    """
    padding = tokenizer.pad_token_id
    # What is generated is padded with the token that is taken for padding below, whatever the model calls so.
    write = batch_generator(model, accelerator, {"pad_token_id": padding, **generation}) if metric else None

    def measure(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        labels = batch["labels"]
        logits = model(**without_row_id(batch)).logits
        losses = nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        sums, counts = losses.sum(dim=1, dtype=torch.float64), (labels != IGNORED).sum(dim=1)
        del logits, losses  # as wide as the vocabulary; generating needs the memory
        return sums, counts, labels.new_zeros((len(labels), 1)) if write is None else write(batch)

    sums, counts, tokens = measured_once(
        model, loader, accelerator, measure, num_rows=len(references), ragged=Ragged(padding)
    )
    loss = require_finite((sums.sum() / counts.sum()).item())
    if metric is None:
        return Evaluation(scores={"loss": loss})
    texts = [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    # Every rank scores, so that every rank has the score, or the error, without a word to the others.
    scored = metric.compute(texts, references)
    length = (tokens != padding).sum(dim=1).double().mean().item()
    return Evaluation(
        scores={**scored.scores, "loss": loss, "gen_len": length},
        details={"intervals": scored.intervals, "signatures": scored.signatures, "generation": generation},
        outputs=texts,
    )


def evaluate_answers_given(
    model: nn.Module, loader: DataLoader[Any], accelerator: Accelerator, *, num_rows: int
) -> Evaluation:
    """Return ``loss``, ``perplexity`` and ``token_accuracy`` over the tokens that are learnt (collective).

    Sums over all tokens divided by their number, so they depend neither on batch size nor on ranks.

    Args:
        model: as prepared; left in the mode it was found in.
        loader: prepared loader of batches with ``labels`` (B, L) and ``idx`` (B,), row numbers from 0.
        accelerator: that prepared both.
        num_rows: rows of the data set.

    Raises:
        TrainingError: where rows are missing, or the loss is not finite; on every rank.
    """

    def measure(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits = model(**without_row_id(batch), use_cache=False).logits[:, :-1].float()
        targets = batch["labels"][:, 1:]
        losses = nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
        )
        right = (logits.argmax(dim=-1) == targets).sum(dim=1)
        return losses.sum(dim=1, dtype=torch.float64), right, (targets != IGNORED).sum(dim=1)

    sums, right, counts = measured_once(model, loader, accelerator, measure, num_rows=num_rows)
    loss = require_finite((sums.sum() / counts.sum()).item())
    accuracy = (right.sum() / counts.sum()).item()
    return Evaluation(
        scores={"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": accuracy}
    )


def write_answers(
    model: nn.Module,
    rows: Dataset,
    accelerator: Accelerator,
    *,
    tokenizer: Any,
    data: CausalDataConfig,
    evaluation: CausalEvalConfig,
) -> Evaluation:
    """Return the answers that a decoder writes to a few prompts, the likeliest token each time (collective).

    Every rank writes all of them.

    Args:
        model: as prepared; left in the mode it was found in.
        rows: from `asked_rows`.
        accelerator: that prepared the model.
        tokenizer: turns tokens into text.
        data: section ``data``: `max_length` bounds prompt and answer together.
        evaluation: section ``eval``: `max_new_tokens` bounds the answer.
    """
    padding, size = tokenizer.pad_token_id, evaluation.per_device_eval_batch_size
    prompts, texts = rows["input_ids"][:], []
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(prompts), size):
            ids = [torch.tensor(row) for row in prompts[first : first + size]]
            batch = {  # padded on the left: the answer follows its prompt
                "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding, padding_side="left"),
                "attention_mask": pad_sequence(
                    [torch.ones_like(row) for row in ids], batch_first=True, padding_side="left"
                ),
            }
            length = batch["input_ids"].shape[1]
            room = min(evaluation.max_new_tokens, data.max_length - length)
            write = batch_generator(model, accelerator, {"pad_token_id": padding, "max_new_tokens": room})
            with torch.no_grad():
                tokens = write({name: each.to(accelerator.device) for name, each in batch.items()})
            texts += tokenizer.batch_decode(tokens[:, length - 1 :], skip_special_tokens=True)
    finally:
        model.train(was_training)
    return Evaluation(scores={}, outputs=[text.strip() for text in texts])


def generation_arguments(evaluation: Seq2SeqEvalConfig, data: Seq2SeqDataConfig) -> dict[str, Any]:
    """Return what the settings say about generating, as arguments of the model's ``generate``."""
    arguments = {"max_new_tokens": evaluation.max_new_tokens or data.max_target_length}
    return arguments if evaluation.num_beams is None else arguments | {"num_beams": evaluation.num_beams}


def generation_is_collective(accelerator: Accelerator) -> bool:
    """Whether ranks have to make every forward pass of a generation together: each holds a shard of the weights."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        return plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def batch_generator(
    model: nn.Module, accelerator: Accelerator, generation: Mapping[str, Any]
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Return what writes for a batch: token ids, one row a text, padded (every call is collective).

    The token that the decoder starts with is left out: it is no part of the text, and a tokenizer may take it for a
    word. ``generation`` are arguments of the model's ``generate``; the model is in eval mode when this is called.
    """
    network: Any = accelerator.unwrap_model(model)
    # FSDP2 gathers the weights of a whole model for its forward alone; generate calls the encoder by itself.
    if accelerator.distributed_type == DistributedType.FSDP and "generate" not in vars(network):
        register_fsdp_forward_method(network, "generate")
    # Ranks that finish their texts early continue with empty passes, because the others' need their shards.
    together = generation_is_collective(accelerator) and accelerator.num_processes > 1

    def write(batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name not in ("labels", ROW_ID)}
        with accelerator.autocast():
            generated = network.generate(
                **inputs, do_sample=False, use_cache=True, synced_gpus=together, **generation
            )
        return generated[:, 1:]

    return write
