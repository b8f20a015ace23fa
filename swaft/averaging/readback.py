"""What has been written, read back: an export is checked before it gets its name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from swaft.averaging.engines.base import PIECE
from swaft.errors import AveragingError
from swaft.storage import TensorFile


def check_written(folder: Path, state_dict: Mapping[str, Tensor]) -> None:
    """Read a folder's tensors back and compare them with what was to be written.

    Where transformers writes tensors in another form than a model holds them (experts one by one, say), those are
    held to their elements and sum of squares, all together.

    Args:
        folder: with files of safetensors.
        state_dict: every tensor that was to be written; tied ones may be left out but for one of their names.

    Raises:
        AveragingError: a tensor is missing, or has another shape, type or norm.
    """
    open_tensors = {tensor.data_ptr(): tensor for tensor in state_dict.values() if tensor.numel()}
    other_numel, other_squares = 0, 0.0
    for path in sorted(folder.glob("*.safetensors")):
        with TensorFile(path) as file:
            for name in file.names:
                found = _squares(file.read(name, first, last) for first, last in _cuts(file.numel(name)))
                if name not in state_dict:
                    other_numel, other_squares = other_numel + file.numel(name), other_squares + found
                    continue
                wanted = state_dict[name]
                form, right = (file.dtype(name), list(file.shape(name))), (wanted.dtype, list(wanted.shape))
                if form != right:
                    raise AveragingError(f"{path}: {name!r} was read back as {form}, expected {right}")
                if not _equal(found, _sum_of_squares(wanted)):
                    raise AveragingError(f"{path}: {name!r} was not read back as it was written")
                open_tensors.pop(wanted.data_ptr(), None)
    numel = sum(tensor.numel() for tensor in open_tensors.values())
    squares = sum(map(_sum_of_squares, open_tensors.values()))
    if numel != other_numel or not math.isclose(squares, other_squares, rel_tol=1e-9):
        names = [name for name, tensor in state_dict.items() if tensor.data_ptr() in open_tensors]
        raise AveragingError(
            f"{folder} lacks {', '.join(names[:3]) or 'nothing'}{', ...' if len(names) > 3 else ''}, and holds "
            f"{other_numel:,} elements under other names with a sum of squares of {other_squares:.9g}; expected "
            f"{numel:,} with {squares:.9g}"
        )


def _equal(found: float, wanted: float) -> bool:
    return found == wanted or (
        math.isnan(found) and math.isnan(wanted)
    )  # a buffer may hold what is no number


def _sum_of_squares(tensor: Tensor) -> float:
    flat = tensor.reshape(-1)
    return _squares(flat[first:last] for first, last in _cuts(len(flat)))


def _cuts(numel: int) -> list[tuple[int, int]]:
    return [(first, min(first + PIECE, numel)) for first in range(0, numel, PIECE)]


def _squares(pieces: Iterable[Tensor]) -> float:
    return sum(float(piece.double().square().sum()) for piece in pieces)
