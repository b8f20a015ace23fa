"""Evaluates how likely a decoder finds the answers of a data set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from swaft.training.data.causal_lm import IGNORED
from swaft.training.evaluation.evaluate import Evaluation, measured_once, require_finite, without_row_id


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
