"""Sums of what the training loop logs, kept on the device: accelerate's own gathering would block every step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from swaft.noise.inputs import IGNORE_INDEX
from swaft.noise.passes import SentCount


class Meter:
    """Sums what is logged, on the device and without waiting for it, and times the training steps."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self.names: tuple[str, ...] = ()
        """Of the values that are logged, the same at every micro-batch."""
        self.sums = self._zeros(0)
        """Since the last line of the log: values times rows, rows, tokens; float64, on the device, this rank's."""
        self._bad_losses = torch.zeros((), device=accelerator.device)
        self._started = time.monotonic()
        self.logged_at_s = 0.0
        """Seconds since training began at the last line of the log."""

    @property
    def seconds(self) -> float:
        """Seconds since training began, pauses excluded."""
        return time.monotonic() - self._started

    def add(self, values: Mapping[str, Tensor | float], *, count: Tensor, tokens: Tensor) -> None:
        """Add one micro-batch.

        Args:
            values: means over its rows by name, 0-dim tensors or plain numbers.
            count: its rows, 0-dim; where it is 0, no token counts either.
            tokens: its tokens, 0-dim.
        """
        if tuple(values) != self.names:  # the first micro-batch, or a resumed recipe that logs something else
            self.names, self.sums = tuple(values), self._zeros(len(values))
        device = self.sums.device
        double = {"dtype": torch.float64, "device": device}
        means = [
            (each.detach().to(**double) if isinstance(each, Tensor) else torch.full((), each, **double))
            * count
            for each in values.values()
        ]
        self.sums += torch.stack([*means, count.double(), (tokens * (count > 0)).double()])

    def note_loss(self, loss: Tensor) -> None:
        """Remember a loss that is not finite."""
        self._bad_losses += ~torch.isfinite(loss.detach())

    def send_bad_losses(self) -> SentCount:
        """Send how many ranks had a loss that is not finite since the last optimizer step (collective).

        One number is exchanged per optimizer step. It is on its way while the step's last backward pass runs, so
        that the host does not wait for the device to be idle.
        """
        found: Any = self._accelerator.reduce(self._bad_losses, reduction="sum")
        self._bad_losses = torch.zeros_like(self._bad_losses)
        return SentCount(found > 0)

    def read(self) -> dict[str, float | None]:
        """Return means over the rows of all ranks since the last call, and tokens a second; collective."""
        total: Any = self._accelerator.reduce(self.sums, reduction="sum")
        *sums, count, tokens = total.tolist()
        seconds = self.seconds - self.logged_at_s
        self.logged_at_s += seconds
        self.sums = self._zeros(len(self.names))
        means: dict[str, float | None] = {
            name: value / count for name, value in zip(self.names, sums, strict=True)
        }
        return means | {"tokens_per_second": tokens / seconds, "seconds": self.logged_at_s}

    def state_dict(self) -> dict[str, Any]:
        """Return the times and the names, without this rank's sums."""
        return {"names": list(self.names), "seconds": self.seconds, "logged_at_s": self.logged_at_s}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count time on from :meth:`state_dict`; the sums are zero."""
        self.names = tuple(state["names"])
        self.sums = self._zeros(len(self.names))
        self._started = time.monotonic() - state["seconds"]
        self.logged_at_s = state["logged_at_s"]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose duration does not count as training."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._started += time.monotonic() - began

    def _zeros(self, values: int) -> Tensor:
        return torch.zeros(values + 2, dtype=torch.float64, device=self._accelerator.device)


def count_tokens(batch: Mapping[str, Any]) -> Tensor:
    """Return how many tokens of a batch are no padding, 0-dim: those read, and those to be written, if any."""
    read = batch.get("attention_mask", batch["input_ids"]).count_nonzero()
    labels = batch.get("labels")
    return read if labels is None or labels.dim() < 2 else read + (labels != IGNORE_INDEX).sum()
