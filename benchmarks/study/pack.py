"""Model and tasks in one small folder, for a machine that has neither: token ids, and weights in fp16.

`python -m benchmarks.study pack FOLDER` writes it. If `$SWAFT_STUDY_PACK` is set to it, nothing else is read. The
encoder rounded to fp16 is not bit for bit the one that other runs start from, so a pack counts as another kind of
machine: its rows are compared with each other.
"""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

SPLITS = ("train", "validation", "test")


def packed() -> Path | None:
    """The folder, if one is set."""
    folder = os.environ.get("SWAFT_STUDY_PACK")
    return Path(folder) if folder else None


def model_folder() -> str:
    """Hugging Face folder of the encoder: the pack's, or the embedded one."""
    folder = packed()
    if folder is not None:
        return str(folder / "model")
    from swaft.training.models.pretrained import demo_model_path

    return demo_model_path()


def model_name() -> str:
    """The initial model, as recorded in rows."""
    return "all-MiniLM-L6-v2" if packed() is None else "all-MiniLM-L6-v2, rounded to fp16"


def write(folder: Path) -> None:
    """Write model and tasks.

    Args:
        folder: created if it is missing.
    """
    from transformers import AutoModel

    from benchmarks.study.tasks import TASKS, read, vocabulary

    AutoModel.from_pretrained(model_folder(), dtype=torch.float16).save_pretrained(folder / "model")
    for name, task in TASKS.items():
        if task.generates:
            vocabulary(name).save(str(folder / f"{name}.tokens.json"))
        for split in SPLITS:
            if split == "test" and task.test != "test":
                continue
            rows = read(name, split)
            entries = {field.name: getattr(rows, field.name) for field in fields(rows)}
            entries["labels"] = rows.labels.tolist()
            with gzip.open(folder / f"{name}-{split}.json.gz", "wt") as file:
                json.dump(entries, file, separators=(",", ":"))


def read_packed(name: str, split: str, kind: type) -> Any:
    """Rows of a split.

    Args:
        name: of the task.
        split: train, validation or test.
        kind: the class of its rows.

    Raises:
        FileNotFoundError: the pack lacks it.
    """
    path = _file(f"{name}-{split}.json.gz")
    with gzip.open(path, "rt") as file:
        entries = {field: tuple(map(_frozen, values)) for field, values in json.load(file).items()}
    return kind(**entries | {"labels": torch.tensor(entries["labels"], dtype=torch.long)})


def read_vocabulary(name: str) -> Any:
    """Tokenizer of what a task generates.

    Raises:
        FileNotFoundError: the pack lacks it.
    """
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(_file(f"{name}.tokens.json")))


def _file(name: str) -> Path:
    folder = packed()
    assert folder is not None
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} holds no {name}; write the pack again where the task's folder is")
    return folder / name


def _frozen(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
