"""Evaluates what an encoder-decoder writes, on every row exactly once, however many ranks share the work."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.data import DataLoader

from swaft.training.config import Seq2SeqDataConfig, Seq2SeqEvalConfig
from swaft.training.data.seq2seq import IGNORED, length_statistics
from swaft.training.evaluation.evaluate import (
    ROW_ID,
    Evaluation,
    each_row_once,
    require_finite,
    without_row_id,
)
from swaft.training.metrics.generation import GenerationMetric
from swaft.training.run.folder import RunFolder

logger = logging.getLogger(__name__)


@torch.no_grad()
def evaluate_texts(
    model: nn.Module,
    loader: DataLoader[Any],
    accelerator: Accelerator,
    *,
    references: Sequence[Sequence[str]],
    tokenizer: Any,
    metric: GenerationMetric | None,
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
    was_training, padding = model.training, tokenizer.pad_token_id
    model.eval()
    try:
        # What is generated is padded with the token that is taken for padding below, whatever the model calls so.
        arguments = {"pad_token_id": padding, **generation}
        write = batch_generator(model, accelerator, arguments) if metric else None
        measured = [_gather(_measure(model, batch, write), accelerator, padding) for batch in loader]
    finally:
        model.train(was_training)
    ids, sums, counts, tokens = (list(column) for column in zip(*measured, strict=True))
    loss_sums, token_counts, generated = each_row_once(
        torch.cat(ids), torch.cat(sums), torch.cat(counts), _stack(tokens, padding), num_rows=len(references)
    )
    loss = require_finite((loss_sums.sum() / token_counts.sum()).item())
    if metric is None:
        return Evaluation(scores={"loss": loss})
    texts = [text.strip() for text in tokenizer.batch_decode(generated, skip_special_tokens=True)]
    # Every rank scores, so that every rank has the score, or the error, without a word to the others.
    scored = metric(texts, references)
    length = (generated != padding).sum(dim=1).double().mean().item()
    return Evaluation(
        scores={**scored.scores, "loss": loss, "gen_len": length},
        details={"intervals": scored.intervals, "signatures": scored.signatures, "generation": generation},
        outputs=texts,
    )


def generation_arguments(evaluation: Seq2SeqEvalConfig, data: Seq2SeqDataConfig) -> dict[str, Any]:
    """Return what the settings say about generating, as arguments of the model's ``generate``."""
    arguments = {"max_new_tokens": evaluation.max_new_tokens or data.max_target_length}
    return arguments if evaluation.num_beams is None else arguments | {"num_beams": evaluation.num_beams}


def report_lengths(train: Dataset, data: Seq2SeqDataConfig) -> None:
    """Say how long the training texts are, and how many of them are cut."""
    for kind in ("source", "target"):
        lengths = length_statistics(train[f"{kind}_length"], getattr(data, f"max_{kind}_length"))
        logger.info(
            "%ss: %.0f tokens on average, 95 %% up to %.0f, longest %d; %.1f %% are cut to %d",
            *(kind, lengths.mean, lengths.p95, lengths.longest, 100 * lengths.share_cut, lengths.limit),
        )


def write_samples(
    folder: RunFolder,
    evaluations: Mapping[str, Mapping[str, Evaluation]],
    rows: Mapping[str, Dataset],
    num_samples: int,
    *,
    columns: Sequence[str] = ("source", "references"),
) -> None:
    """Write the first rows of each split with what the last and the averaged weights wrote for them.

    Args:
        folder: gets a file ``samples-<split>.jsonl``, one row a line, for every split with generated texts.
        evaluations: by split and kind of weights.
        rows: that were written for, by split.
        num_samples: rows of each split.
        columns: what is written of each row.
    """
    for split, kinds in evaluations.items():
        first = rows[split][:num_samples]
        written = {
            kind: evaluation.outputs[:num_samples] for kind, evaluation in kinds.items() if evaluation.outputs
        }
        shown = {name: first[name] for name in columns} | written
        if written and num_samples:
            lines = [dict(zip(shown, row, strict=True)) for row in zip(*shown.values(), strict=True)]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            folder.write_text(f"samples-{split}.jsonl", text)


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
    word.

    Args:
        model: as prepared, in eval mode.
        accelerator: that prepared it.
        generation: arguments of the model's ``generate``.
    """
    network: Any = accelerator.unwrap_model(model)
    # FSDP2 gathers the weights of a whole model for its forward alone; generate calls the encoder by itself.
    if accelerator.distributed_type == DistributedType.FSDP and "generate" not in vars(network):
        register_fsdp_forward_method(network, "generate")
    # Ranks that finish their texts early go on with empty passes, because the others' need their shards.
    together = generation_is_collective(accelerator) and accelerator.num_processes > 1

    def write(batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name not in ("labels", ROW_ID)}
        with accelerator.autocast():
            generated = network.generate(
                **inputs, do_sample=False, use_cache=True, synced_gpus=together, **generation
            )
        return generated[:, 1:]

    return write


def _measure(
    model: nn.Module, batch: Mapping[str, Tensor], write: Callable[[Mapping[str, Tensor]], Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row numbers (B,), loss sums (B,), token counts (B,) and generated ids (B, T) of a batch."""
    ids, labels = batch[ROW_ID], batch["labels"]
    logits = model(**without_row_id(batch)).logits
    losses = nn.functional.cross_entropy(
        logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
    )
    sums, counts = losses.sum(dim=1, dtype=torch.float64), (labels != IGNORED).sum(dim=1)
    del logits, losses  # as wide as the vocabulary; generating needs the memory
    return ids, sums, counts, ids.new_zeros((len(ids), 1)) if write is None else write(batch)


def _gather(
    measured: tuple[Tensor, Tensor, Tensor, Tensor], accelerator: Accelerator, padding: int
) -> tuple[Tensor, ...]:
    """Put together what all ranks measured in a batch, on the host."""
    ids, sums, counts, tokens = measured
    tokens = accelerator.pad_across_processes(tokens, dim=1, pad_index=padding)
    return tuple(tensor.cpu() for tensor in accelerator.gather((ids, sums, counts, tokens)))


def _stack(tokens: Sequence[Tensor], padding: int) -> Tensor:
    """Stack rows of token ids, padded on the right to the longest of all."""
    longest = max(rows.shape[1] for rows in tokens)
    return torch.cat(
        [nn.functional.pad(rows, (0, longest - rows.shape[1]), value=padding) for rows in tokens]
    )
