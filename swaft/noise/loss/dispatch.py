"""Which row kernel computes where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch

from swaft.noise.loss import rows as torch_rows
from swaft.noise.loss.rows import RowStatistics

RowKernel = Callable[..., RowStatistics]
"""A function with the signature of ``swaft.noise.loss.rows.rows``."""

_replacement: list[RowKernel] = []


def row_kernel(device: torch.device, dtype: torch.dtype) -> RowKernel:
    """Pick the kernel of a device: Triton's on CUDA in fp32, where Triton is installed; else torch's.

    Args:
        device: where the logits are.
        dtype: of the logits; Triton's kernel has no float64.
    """
    if _replacement:
        return _replacement[-1]
    if device.type == "cuda" and dtype == torch.float32 and _has_triton():
        from swaft.noise.loss.rows_triton import rows as triton_rows

        return triton_rows
    return torch_rows.rows


@contextmanager
def row_kernel_replaced(kernel: RowKernel) -> Iterator[None]:
    """Compute rows with another kernel on every device; for tests."""
    _replacement.append(kernel)
    try:
        yield
    finally:
        _replacement.pop()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
