"""Model and tasks in one small folder, for a machine that has neither: token ids, and weights in fp16.

`python -m benchmarks.study pack FOLDER` writes it; where `$SWAFT_STUDY_PACK` names it, nothing else is read.
Rounded to fp16 the encoder is not bit for bit what others begin with, so each row names what it began with, and
rows of a pack are compared with each other.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import torch

SPLITS = ("train", "validation", "test")


def packed() -> Path | None:
    """The folder, where one is named."""
    folder = os.environ.get("SWAFT_STUDY_PACK")
    return Path(folder) if folder else None


def model_folder() -> str:
    """Hugging Face folder of the encoder: the pack's, or the embedded one."""
    folder = packed()
    if folder is not None:
        return str(folder / "model")
    from swaft.training.demo.model import demo_model_path

    return demo_model_path()


def model_name() -> str:
    """What rows say they began with."""
    return "all-MiniLM-L6-v2" if packed() is None else "all-MiniLM-L6-v2, rounded to fp16"


def write(folder: Path) -> None:
    """Write model and tasks.

    Args:
        folder: made where it is missing.
    """
    from transformers import AutoModel

    from benchmarks.study.tasks import TASKS, read

    AutoModel.from_pretrained(model_folder(), dtype=torch.float16).save_pretrained(folder / "model")
    arrays = {}
    for name, task in TASKS.items():
        for split in SPLITS:
            if split == "test" and task.test != "test":
                continue
            rows = read(name, split)
            arrays[f"{name}/{split}/ids"] = np.concatenate([np.array(row, np.uint16) for row in rows.ids])
            arrays[f"{name}/{split}/segments"] = np.concatenate(
                [np.array(row, bool) for row in rows.segments]
            )
            arrays[f"{name}/{split}/lengths"] = np.array([len(row) for row in rows.ids], np.uint8)
            arrays[f"{name}/{split}/labels"] = rows.labels.numpy().astype(np.uint8)
    np.savez_compressed(folder / "tasks.npz", **arrays)


def read_packed(name: str, split: str) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[int]]:
    """Token ids, token type ids and classes of a split.

    Raises:
        FileNotFoundError: the pack lacks it.
    """
    arrays = _arrays()
    key = f"{name}/{split}"
    if f"{key}/lengths" not in arrays:
        raise FileNotFoundError(f"{packed()} holds no {key}; write the pack anew where the task's folder is")
    ends = np.cumsum(arrays[f"{key}/lengths"].astype(np.int64))[:-1]
    ids, segments = (np.split(arrays[f"{key}/{part}"].astype(np.int64), ends) for part in ("ids", "segments"))
    return (
        [tuple(row.tolist()) for row in ids],
        [tuple(row.tolist()) for row in segments],
        (arrays[f"{key}/labels"].astype(np.int64).tolist()),
    )


@cache
def _arrays() -> dict[str, np.ndarray]:
    folder = packed()
    assert folder is not None
    with np.load(folder / "tasks.npz") as file:
        return {name: file[name] for name in file.files}
