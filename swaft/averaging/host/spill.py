"""Finished lanes on disk, in files without a name: nobody can change them, and no end of a process leaves them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor

from swaft.errors import AveragingError
from swaft.storage.files import write_all


def moved_to_disk(tensor: Tensor, folder: Path) -> Tensor:
    """Return the same values mapped from a new file: not read before they are needed, gone with the process.

    Args:
        tensor: (numel,), fp32 or bf16, in host memory.
        folder: for the file.

    Raises:
        AveragingError: the file could not be written.
    """
    if not tensor.numel():  # an empty file cannot be mapped
        return tensor
    try:
        # Written, not copied into the map: a full disk then is an error, where a map would end the process.
        with TemporaryFile(dir=folder, buffering=0) as file:
            write_all(file.fileno(), tensor.view(torch.uint8).numpy().data)
            return torch.from_numpy(np.memmap(file, np.uint8, mode="c")).view(tensor.dtype)
    except OSError as error:
        raise AveragingError(
            f"averaging.spill_dir: {folder} could not take a finished part: {error}"
        ) from error


def require_writable(folder: Path) -> None:
    """Raise an `AveragingError` unless files can be made in a folder, which is made where there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise AveragingError(
            f"averaging.spill_dir: {folder} cannot be written to ({error}); name another folder"
        ) from error
