"""Short digests by which a run that goes on knows that it has the model and the rows it began with."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from datasets import Dataset
from torch import nn

from swaft.averaging.state import sum_of_bits

SAMPLED_ROWS = 64
"""Rows that stand for all of them: reading every row would take as long as a pass."""


def fingerprint_frozen(model: nn.Module) -> str:
    """Digest of the names, shapes and bits of the weights that are not trained, which no checkpoint holds.

    Args:
        model: on the host, before an engine takes it apart.

    Returns:
        64 hex digits; of 16-bit weights those of the same numbers in fp32.
    """
    frozen = [
        (
            name,
            list(parameter.shape),
            sum_of_bits(piece.float() for piece in parameter.reshape(-1).split(1 << 24)),
        )
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    ]
    return _digest(frozen)


def fingerprint_architecture(model: nn.Module) -> str:
    """Digest of the names and shapes of a model's weights, and which of them are trained.

    Args:
        model: before an engine takes it apart.
    """
    return _digest([(name, list(p.shape), p.requires_grad) for name, p in model.named_parameters()])


def fingerprint_rows(rows: Dataset) -> str:
    """Digest of the columns and of `SAMPLED_ROWS` rows spread evenly, the first and the last among them.

    Args:
        rows: as the model is given them.
    """
    last, places = len(rows) - 1, max(1, min(SAMPLED_ROWS, len(rows)) - 1)
    indices = sorted({place * last // places for place in range(places + 1)})
    return _digest([rows.column_names, rows.select(indices).with_format(None).to_list()])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
