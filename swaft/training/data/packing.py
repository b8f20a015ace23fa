"""Packs several rows of token ids into one, for a decoder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher

from swaft.training.data.files import reading_code
from swaft.training.data.texts import ROWS_AT_ONCE

logger = logging.getLogger(__name__)

FEATURES = {name: List(Value("int32")) for name in ("input_ids", "labels", "position_ids")}


def pack(rows: Dataset, max_length: int) -> Dataset:
    """Pack rows into few of `max_length` tokens, the longest first, each where it fits; deterministic.

    They are written to the cache of `datasets`: of the ranks of a machine the first writes, the others wait for it.

    Returns:
        A dataset with `input_ids`, `labels`, `position_ids` (from 0 in every original row) and `idx`.
    """
    chunks = rows.select_columns("input_ids").with_format("arrow").iter(ROWS_AT_ONCE)
    lengths = np.concatenate([chunk["input_ids"].combine_chunks().value_lengths() for chunk in chunks])  # type: ignore[index]
    order, places = first_fit(lengths, max_length)
    order = order[np.argsort(places, kind="stable")]
    ends = np.cumsum(np.bincount(places))

    def packed() -> Iterator[dict[str, Any]]:
        for number, members in enumerate(np.split(order, ends[:-1])):
            read = rows[members]
            yield {
                "input_ids": list(chain.from_iterable(read["input_ids"])),
                "labels": list(chain.from_iterable(read["labels"])),
                "position_ids": list(chain.from_iterable(map(range, lengths[members]))),
                "idx": number,
            }

    logger.info("%d rows are packed into %d of %d tokens at most", len(rows), len(ends), max_length)
    return Dataset.from_generator(
        packed,
        features=Features(FEATURES | {"idx": Value("int64")}),
        fingerprint=Hasher.hash((reading_code(), rows._fingerprint, max_length)),
        writer_batch_size=100,  # packed rows in memory at once
    )


def first_fit(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Place rows in packed rows: the longest first, each in the first packed row with room for it, or in a new one.

    Rows of one length are placed together: they fill the packed rows from the first on.

    Args:
        lengths: (rows,) whole numbers from 1 to `max_length`.
        max_length: room of a packed row.

    Returns:
        The rows in the order in which they are placed, and the packed row of each: both (rows,) int64.
    """
    room, places = np.zeros(0, dtype=np.int64), list[np.ndarray]()
    for length, count in zip(*(each[::-1] for each in np.unique(lengths, return_counts=True)), strict=True):
        fit = room // length
        missing, in_new = max(0, count - fit.sum()), max_length // length
        new = -(-missing // in_new)
        room, fit = np.append(room, np.full(new, max_length)), np.append(fit, np.full(new, in_new))
        taken = np.diff(np.minimum(np.cumsum(fit), count), prepend=0)
        room -= taken * length
        places.append(np.repeat(np.arange(len(room)), taken))
    return np.argsort(-lengths, kind="stable"), np.concatenate(places)
