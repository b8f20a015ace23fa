"""Sums of what the training loop logs, kept on the device so that no step waits for them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from swaft.noise import ObjectiveOutput
from swaft.noise.inputs import IGNORE_INDEX


class Meter:
    """Sums what is logged, on the device and without waiting for it, and times the training steps."""

    NAMES = ("loss", "task_loss", "divergence", "noise_to_signal", "changed")

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self.sums = self._zeros()
        """Of what is logged, since the last line of the log: (values,), float64, on the device; this rank's."""
        self._bad_losses = torch.zeros((), device=accelerator.device)
        self._started = time.monotonic()
        self.logged_at_s = 0.0
        """Seconds since training began at the last line of the log."""

    @property
    def seconds(self) -> float:
        """Seconds since training began, pauses excluded."""
        return time.monotonic() - self._started

    def add(self, out: ObjectiveOutput, batch: Mapping[str, Any], count: Tensor) -> None:
        """Add one micro-batch.

        Args:
            out: of the objective, means over rows.
            batch: what it was given.
            count: how many rows, 0-dim; where it is 0, no token counts either.
        """
        means = torch.stack([getattr(out, name).detach().double() for name in self.NAMES])
        tokens = count_tokens(batch) * (count > 0)
        self.sums += torch.cat([means * count, torch.stack([count, tokens])])
        self._bad_losses += ~torch.isfinite(out.loss.detach())

    def found_bad_loss(self) -> bool:
        """Whether any rank had a loss that is not finite since the last optimizer step (collective).

        One number is exchanged per optimizer step, before the backward pass that would apply it.
        """
        found: Any = self._accelerator.reduce(self._bad_losses, reduction="sum")
        self._bad_losses = torch.zeros_like(self._bad_losses)
        return bool(found.item() > 0)

    def read(self) -> dict[str, float | None]:
        """Return means over the rows of all ranks since the last call, and tokens a second; collective."""
        total: Any = self._accelerator.reduce(self.sums, reduction="sum")
        *sums, count, tokens = total.tolist()
        seconds = self.seconds - self.logged_at_s
        self.logged_at_s += seconds
        self.sums = self._zeros()
        means: dict[str, float | None] = {
            name: value / count for name, value in zip(self.NAMES, sums, strict=True)
        }
        return means | {"tokens_per_second": tokens / seconds, "seconds": self.logged_at_s}

    def restore(self, *, seconds: float, logged_at_s: float) -> None:
        """Go on where a training had taken ``seconds`` so far, ``logged_at_s`` of them up to its last log line."""
        self._started = time.monotonic() - seconds
        self.logged_at_s = logged_at_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose duration does not count as training."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._started += time.monotonic() - began

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self.NAMES) + 2, dtype=torch.float64, device=self._accelerator.device)


def count_tokens(batch: Mapping[str, Any]) -> Tensor:
    """Return how many tokens of a batch are no padding, 0-dim: those read, and those to be written, if any."""
    read = batch.get("attention_mask", batch["input_ids"]).count_nonzero()
    labels = batch.get("labels")
    return read if labels is None or labels.dim() < 2 else read + (labels != IGNORE_INDEX).sum()
