"""One optimizer step of a recipe's loop, how far a run has come, and the sums of what its loop logs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from swaft.errors import TrainingError
from swaft.noise.passes import SentCount
from swaft.training.evaluation.evaluate import without_row_id
from swaft.training.run.batches import MicroBatch, count_tokens, loss_factors

if TYPE_CHECKING:
    from swaft.training.run.run import Run


@dataclass
class Position:
    """How far a run has come, between two optimizer steps."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    epoch: int = 0
    """Passes over the training rows before this one."""
    batches: int = 0
    """Micro-batches of this pass that each rank has trained on."""
    evaluated: bool = True
    """Whether the evaluation that was due after the step has been made."""
    stopped: bool = False
    """Whether an evaluation has ended the run."""

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the values of another."""
        vars(self).update(state)


class Step:
    """An optimizer step, from its micro-batches to the update.

    Args:
        run: whose step it is.
        number: from 1 on.
        batches: its micro-batches.
    """

    def __init__(self, run: Run, number: int, batches: Sequence[MicroBatch]):
        self.number = number
        self._run, self._batches = run, batches
        self._logged: dict[str, Any] = {}
        self._grad_norm: Tensor | None = None

    def micro_batches(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yield each micro-batch, and what its loss has to be multiplied by (collective).

        The factors make the step's gradient that of one mean over all rows of all micro-batches and ranks, for a
        loss that is a mean over the rows, or tokens, that count.
        """
        run, batches = self._run, self._batches
        factors = loss_factors([batch.count for batch in batches], run.accelerator)
        for batch, factor in zip(batches, factors, strict=True):
            # accelerate would ask the loader, which has been read to the end of the step already.
            run.accelerator.sync_gradients = batch is batches[-1]
            with nullcontext() if run.accelerator.sync_gradients else run.accelerator.no_sync(run.model):
                yield without_row_id(batch.inputs), factor
            run.meter.add(self._logged, count=batch.count, tokens=count_tokens(batch.inputs))
            self._logged = {}

    def log(self, **values: Any) -> None:
        """Note numbers of this micro-batch, 0-dim; their means over rows are logged when it is due.

        Names are the same at every micro-batch and on every rank, ``loss`` among them.
        """
        self._logged |= values

    def backward(self, loss: Tensor) -> None:
        """Run backward on the loss of a micro-batch.

        Raises:
            TrainingError: on every rank, from the last backward of a step with a loss that is not finite: before
                its weights can be averaged or saved, and, unless DeepSpeed takes the step itself, before there are
                any.
        """
        accelerator, meter = self._run.accelerator, self._run.meter
        meter.note_loss(loss)
        bad = meter.send_bad_losses() if accelerator.sync_gradients else None
        accelerator.backward(loss)
        if bad is not None and bad.read():
            rate = self._run.optimizer.param_groups[0]["lr"]
            raise TrainingError(
                f"the loss of optimizer step {self.number} is not finite (learning rate {rate:.3g}, mixed "
                f"precision {accelerator.mixed_precision}); nothing of the step was averaged or saved. Lower "
                "train.learning_rate or noise.sigma, check that train.max_grad_norm is on, and look at the rows "
                "for empty texts or labels that are not numbers"
            )

    def clip_gradients(self) -> None:
        """Clip the gradients to ``train.max_grad_norm``; 0 clips nothing.

        DeepSpeed clips by itself, inside backward, to the ``gradient_clipping`` of its configuration.
        """
        run = self._run
        if run.accelerator.distributed_type != DistributedType.DEEPSPEED:
            limit = run.config.train.max_grad_norm or float("inf")
            self._grad_norm = run.accelerator.clip_grad_norm_(run.model.parameters(), limit)

    def measured_grad_norm(self) -> float | None:
        """Norm of the gradients before clipping, None where the engine does not measure it."""
        measure: Any = getattr(self._run.model, "get_global_grad_norm", None)  # DeepSpeed's engine has it
        measured = self._grad_norm if measure is None else measure()
        return None if measured is None else float(measured)


class Meter:
    """Sums what is logged, on the device and without waiting for it, and times the training steps.

    accelerate's own gathering would block every step.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._bad_losses = torch.zeros((), device=accelerator.device)
        self.load_state_dict({"names": (), "seconds": 0.0, "logged_at_s": 0.0})

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
            self._begin(values)
        double: Any = {"dtype": torch.float64, "device": self.sums.device}
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
        since, self.logged_at_s = self.logged_at_s, self.seconds
        self._begin(self.names)
        return {
            **{name: value / count for name, value in zip(self.names, sums, strict=True)},
            "tokens_per_second": tokens / (self.logged_at_s - since),
            "seconds": self.logged_at_s,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the times and the names, without this rank's sums."""
        return {"names": list(self.names), "seconds": self.seconds, "logged_at_s": self.logged_at_s}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count time on from :meth:`state_dict`; the sums are zero."""
        self._begin(state["names"])
        self._started = time.monotonic() - state["seconds"]
        self.logged_at_s: float = state["logged_at_s"]
        """Seconds since training began at the last line of the log."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose duration does not count as training."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._started += time.monotonic() - began

    def _begin(self, names: Sequence[str] | Mapping[str, Any]) -> None:
        self.names = tuple(names)
        """Names of the values that are logged, the same at every micro-batch."""
        self.sums = torch.zeros(len(names) + 2, dtype=torch.float64, device=self._accelerator.device)
        """Since the last line of the log: values times rows, rows, tokens; on the device, this rank's."""
