"""A Hugging Face folder written as a stream, complete or absent: weights, other files, a model card."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swaft.errors import ConfigError, StateError, one_line
from swaft.soup.huggingface import ADAPTER_CONFIG, CONFIG, read_json
from swaft.storage import (
    FileRecord,
    Spec,
    TensorFile,
    hash_file,
    write_durably,
    write_tensors,
)
from swaft.storage.files import explained, is_free, open_regular
from swaft.storage.model_card import CARD, write_card
from swaft.storage.tensor_file import name_of

Shard = dict[str, Spec]

WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".ot",
    ".index.json",
)
"""Suffixes of files of weights and of training state. They are not copied."""
LEFT_NAMES = (
    *("trainer_state.json", "noise.json", "manifest.json", "COMPLETE", "latest", "average.json", CARD),
    *("all_results.json", "train_results.json", "eval_results.json", "predict_results.json"),
    "zero_to_fp32.py",
)
"""Other files that are not copied: they describe the checkpoint, not the result."""
LEFT_STARTS = ("events.out.tfevents", "random_states_", "custom_checkpoint_")
"""Starts of the names of such files, the last two of accelerate's states."""
MODULES = "modules.json"
"""Lists the subfolders that sentence-transformers opens along with the folder."""


def refuse_occupied(path: Path) -> None:
    """Refuse a path that is occupied, or cannot name a folder.

    Raises:
        ConfigError: it has no last part, like ".", or one that is not a valid file name.
        StateError: it is a file, a folder that is not empty, or a mount point.
    """
    if path.name in ("", "..") or "\0" in str(path):
        raise ConfigError(f"--output is {str(path)!r}; expected the path of a new folder, such as runs/soup")
    if os.path.ismount(path):
        raise StateError(f"{path} is where a disk is mounted; name a new folder inside it as --output")
    if not is_free(path):
        raise StateError(f"{path} is there already; nothing was changed in it. Name a new folder as --output")


def refuse_modules(source: Path) -> None:
    """Refuse a folder of sentence-transformers that has weights in subfolders, which are not averaged.

    Raises:
        StateError: a subfolder that its `modules.json` lists holds weights, or a file could not be read.
    """
    with explained(source, "looked into"):
        listed = (source / MODULES).read_text(errors="replace") if (source / MODULES).exists() else ""
        for path in sorted(source.iterdir()):
            if f'"{path.name}"' in listed and (held := _first_weights(path)):
                raise StateError(
                    f"{path} holds weights of its own ({held}), which are not averaged, and {MODULES} lists it as "
                    "a part of the model, which would not open without it. Average such models in Python: open "
                    "them with SentenceTransformer, load the mean of their state_dict() into one of them, and call "
                    "its save_pretrained"
                )


def plan_shards(specs: Mapping[str, Spec], most_bytes: float) -> list[Shard]:
    """Which tensors go into which file: in order, each file as full as possible, with at least one tensor."""
    shards: list[Shard] = [{}]
    room = most_bytes
    for name, spec in specs.items():
        if spec.nbytes > room and shards[-1]:
            shards.append({})
            room = most_bytes
        shards[-1][name] = spec
        room -= spec.nbytes
    return shards


def write_weights(
    folder: Path,
    stem: str,
    shards: list[Shard],
    slices: Callable[[str], Iterable[Tensor]],
) -> dict[str, FileRecord]:
    """Write the files of weights, and an index if there are several.

    Args:
        folder: an existing folder.
        stem: the start of the file names.
        shards: what goes into each file.
        slices: returns the elements of a tensor, in order.

    Returns:
        the records of the files of weights, by name.
    """
    records, weight_map = {}, {}
    for number, shard in enumerate(shards, start=1):
        tail = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        name = f"{stem}{tail}.safetensors"
        records[name] = write_tensors(folder / name, shard, slices, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        specs = [spec for shard in shards for spec in shard.values()]
        total = {
            "total_size": sum(spec.nbytes for spec in specs),
            "total_parameters": sum(spec.numel for spec in specs),
        }
        write_json(folder / f"{stem}.safetensors.index.json", {"metadata": total, "weight_map": weight_map})
    return records


def check_weights(folder: Path, shards: list[Shard], records: Mapping[str, FileRecord]) -> None:
    """Read files of weights back from the disk and compare them with what was written.

    Raises:
        StateError: a byte or a field of a header differs.
    """
    for shard, (name, record) in zip(shards, records.items(), strict=True):
        _forget(folder / name)
        if hash_file(folder / name) != record:
            raise StateError(f"{folder / name} does not read as it was written; the disk may be failing")
        with TensorFile(folder / name) as file:
            found = file.specs
        if found != shard:
            raise StateError(f"{folder / name} does not hold the tensors that were written")


def fingerprint(records: Mapping[str, FileRecord]) -> str:
    """One hash of all files of weights: the SHA-256 of a line "DIGEST  NAME" each, in the order of their names."""
    lines = "".join(f"{record.sha256}  {name}\n" for name, record in sorted(records.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def copy_files(source: Path, folder: Path, left: Collection[str] = LEFT_NAMES) -> list[str]:
    """Copy configuration, tokenizer and code of a Hugging Face folder: everything except weights and training
    state.

    Subfolders are copied the same way, except those that hold weights of their own, such as a run's checkpoints,
    and links to folders. Links to files are followed, as in the hub's cache.

    Args:
        source: the Hugging Face folder.
        folder: existing folder to copy to.
        left: names of files that are not copied; does not apply to subfolders.

    Returns:
        What was left out but may be needed, in words.

    Raises:
        StateError: a file could not be read or written.
    """
    notes = []
    with explained(source, "copied"):
        for path in sorted(source.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_file():
                if path.name not in left and not _is_left(path.name):
                    shutil.copyfile(path, folder / path.name)
            elif path.is_dir() and not path.is_symlink():
                if held := _first_weights(path):
                    notes.append(f"{path} is not copied: it holds weights of its own ({held})")
                    continue
                (folder / path.name).mkdir()
                notes += copy_files(path, folder / path.name, left=())
                if not any((folder / path.name).iterdir()):
                    (folder / path.name).rmdir()
    return notes


def describe(folder: Path, title: str, shares: Sequence[tuple[str, float]], dtype: str, sha256: str) -> None:
    """Write a model card that says what was averaged.

    Args:
        folder: of the weights.
        title: of the card.
        shares: what was averaged, in words, and the share of each in the mean.
        dtype: of the weights.
        sha256: their hash, as in `average.json`.

    Raises:
        StateError: the card could not be written.
    """
    what = "the weighted mean of these checkpoints" if len(shares) > 1 else "the weights of this checkpoint"
    body = [
        f"This folder holds {what}, in {dtype}, written by swaft:",
        "",
        *(f"* {share:.6g} of `{one_line(name)}`" for name, share in shares),
        "",
        f"SHA-256 of the weights: `{sha256}` (`average.json` says more).",
    ]
    library, base_model = "transformers", None
    if (folder / ADAPTER_CONFIG).exists():
        library, base_model = "peft", read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    write_card(folder, title=title, body=body, library=library, base_model=base_model)


def set_config_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Write the dtype of the weights into `config.json`, if there is one, and into its nested configurations."""
    if (folder / CONFIG).exists():
        config = read_json(folder / CONFIG) | {"dtype": None}
        write_json(folder / CONFIG, _with_dtype(config, name_of(dtype)))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, keys sorted."""
    write_durably(path, (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def _with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    found = {
        key: _with_dtype(value, name) if isinstance(value, dict) else value for key, value in config.items()
    }
    if "torch_dtype" in found:
        found["dtype"] = found.pop("torch_dtype")
    if "dtype" in found:
        found["dtype"] = name
    return found


def _forget(path: Path) -> None:
    """Drop a file from the system's page cache, so that reading it reads the disk."""
    with open_regular(path) as file, explained(path, "read"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _is_left(name: str) -> bool:
    return name.endswith((*WEIGHTS, ".tmp")) or name.startswith(LEFT_STARTS)


def _first_weights(folder: Path) -> str | None:
    """The first file of weights anywhere in a folder."""
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            if name.endswith(WEIGHTS):
                return str((Path(parent) / name).relative_to(folder))
    return None
