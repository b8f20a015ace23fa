"""Hugging Face folders and peft adapter folders: `NAME.safetensors`, or shards with an index."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from swaft.errors import StateError
from swaft.soup.checkpoint import SavedWeights
from swaft.storage import Spec, TensorFile
from swaft.storage.files import explained, read_whole
from swaft.storage.strict_json import parse_object, shown

MODEL = "model"
ADAPTER = "adapter_model"
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
JSON_LIMIT = 256_000_000
"""Maximum bytes of an index or a configuration."""
NO_JSON = re.compile(rb"[:\[,]\s*(-?Infinity|NaN)\b")
"""Numbers that Python writes into JSON but JSON does not have."""


def open_folder(path: Path) -> SavedWeights:
    """Open a folder of safetensors files; one of them is open at a time.

    Files may be symbolic links, as in the hub's cache.

    Raises:
        StateError: it has no such files, or they are damaged or contradict the index.
    """
    with explained(path, "looked at"):
        if not path.is_dir():
            raise StateError(f"{path} is not a folder; expected a Hugging Face folder on this machine")
        is_adapter = (path / ADAPTER_CONFIG).exists()
    specs, file_of = dict[str, Spec](), dict[str, str]()
    listed = _weight_map(path, ADAPTER if is_adapter else MODEL)
    for file_name in dict.fromkeys(listed.values()):
        with TensorFile(_real(path / file_name)) as file:
            for name in file.specs:
                if name in specs:
                    raise StateError(f"{path}: {name!r} is both in {file_of[name]} and in {file_name}")
            specs |= file.specs
            file_of |= dict.fromkeys(file.specs, file_name)
    for name, file_name in listed.items():
        if name and file_of.get(name) != file_name:
            raise StateError(f"{path}: the index says that {name!r} is in {file_name}, which lacks it")
    opened: list[TensorFile] = []

    def close() -> None:
        while opened:
            opened.pop().close()

    def read(name: str, start: int, end: int) -> Tensor:
        real = _real(path / file_of[name])
        if not opened or opened[0].path != real:
            close()
            opened.append(TensorFile(real))
        return opened[0].read(name, start, end)

    return SavedWeights(
        path=path, specs=specs, read=read, close=close, label=str(path), files=path, is_adapter=is_adapter
    )


def holds_weights(path: Path) -> bool:
    """Whether a folder looks like one of these."""
    names = [f"{stem}.safetensors{tail}" for stem in (MODEL, ADAPTER) for tail in ("", ".index.json")]
    with explained(path, "looked into"):
        return any((path / name).exists() for name in names)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        StateError: it is missing, not a JSON object, or nested too deep.
    """
    raw = read_whole(_real(path), limit=JSON_LIMIT)
    try:
        return parse_object(raw, str(path))
    except StateError as error:
        if NO_JSON.search(raw) is None:
            raise
        raise StateError(
            f"{error}. Versions of transformers before 5 wrote that; rewrite the configuration with "
            "AutoConfig.from_pretrained(...).save_pretrained(...) of this one"
        ) from error


def _weight_map(path: Path, stem: str) -> dict[str, str]:
    """Maps tensors to files, as in the index; {"": file} if there is one file and no index."""
    single, index = path / f"{stem}.safetensors", path / f"{stem}.safetensors.index.json"
    if single.exists():
        return {"": single.name}
    if not index.exists():
        raise StateError(f"{path} holds neither {single.name} nor {index.name}")
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise StateError(
            f"{index}: weight_map: found {shown(listed)}, expected an object of tensors and files"
        )
    for name, file_name in listed.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name or not file_name.isprintable():
            raise StateError(
                f"{index}: weight_map: {shown(name)}: found {shown(file_name)}, expected a file name"
            )
    return listed


def _real(path: Path) -> Path:
    with explained(path, "opened"):
        try:
            return path.resolve(strict=True)
        except RuntimeError as error:  # raised by Python before 3.13
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from error
