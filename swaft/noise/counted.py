"""How many rows count, on the host, without making the host wait for the passes."""

from __future__ import annotations

import torch
from torch import Tensor


class CountedRows:
    """A number that leaves the device before the passes are queued, and is read when they are under way.

    Args:
        counted: which rows count, bool, any shape.
    """

    def __init__(self, counted: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._number = counted.sum()
        if counted.is_cuda:
            pinned = torch.empty((), dtype=self._number.dtype, pin_memory=True)
            self._number = pinned.copy_(self._number, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> int:
        """Wait for the number, that is for what was queued before it, and give it."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._number)
