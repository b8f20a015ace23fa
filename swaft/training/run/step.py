"""The optimizer steps of a recipe's loop: their micro-batches, the weight of each, and the log's sums.

A step of several batches on several ranks equals one on all rows at once: a loss is a mean over the rows that count
(target tokens for a model that generates, examples for one that classifies), and engines take the mean of such
means over micro-batches and ranks, in which a token weighs more the fewer its micro-batch has. So each
micro-batch's loss is scaled by its share of the step's rows. Rows that accelerate repeats at the end of an epoch,
to give all ranks equally many full micro-batches, are left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from accelerate.utils import DistributedType
from torch import Tensor
from torch.utils.data import DataLoader

from swaft.distributed import shared_ranks
from swaft.errors import TrainingError
from swaft.noise.inputs import IGNORE_INDEX
from swaft.noise.passes import SentCount
from swaft.training.evaluation.evaluate import without_row_id

if TYPE_CHECKING:
    from swaft.training.run.run import Run


@dataclass(frozen=True)
class MicroBatch:
    """The rows that a rank computes at once."""

    inputs: dict[str, Any]
    """Rows by column, each row once per epoch over all ranks. If other ranks have the last rows, repeated rows,
    because all ranks have to take part in every pass."""
    count: Tensor
    """Number of rows that its loss is the mean of, 0-dim, on the batch's device; 0 for repeated rows."""


def step_batches(
    loader: DataLoader[Any], accumulation: int, *, epoch: int = 0, skip: int = 0
) -> Iterator[tuple[int, int, list[MicroBatch]]]:
    """Yield, epoch after epoch, the micro-batches of each optimizer step.

    A step has ``accumulation`` of them, or fewer at the end of an epoch whose length is not a multiple.

    Args:
        loader: a loader whose order depends only on the number of the epoch.
        accumulation: micro-batches per step.
        epoch: number of the first epoch.
        skip: micro-batches to skip in it.

    Yields:
        Number of the epoch, micro-batches read from it, including this step's, and the micro-batches.
    """
    while True:
        if isinstance(loader, DataLoaderShard):
            loader.set_epoch(epoch)
        batches = enumerate(skip_first_batches(loader, skip) if skip else loader, start=skip)
        while step := list(islice(batches, accumulation)):
            skip += len(step)
            yield epoch, skip, [_own_part(batch, loader, number) for number, batch in step]
        epoch, skip = epoch + 1, 0


def _own_part(batch: Mapping[str, Any], loader: DataLoader[Any], number: int) -> MicroBatch:
    """Return a micro-batch, by its number in the epoch from 0, without repeated rows.

    Ranks take a prepared loader's batches in turn, and accelerate fills up the last ones with the first rows, after
    the rank's own. Nothing is repeated if the ranks do not share the loader.
    """
    shared = getattr(loader, "batch_sampler", None)
    if not isinstance(shared, BatchSamplerShard) or (size := shared.batch_size) is None:
        return MicroBatch(dict(batch), count_rows(batch))
    first = (number * shared.num_processes + shared.process_index) * size
    own = min(max(len(loader.dataset) - first, 0), size)  # type: ignore[arg-type]
    if own == 0:
        return MicroBatch(dict(batch), torch.zeros_like(count_rows(batch)))
    inputs = {name: value[:own] if _length(value) == size else value for name, value in batch.items()}
    return MicroBatch(inputs, count_rows(inputs))


def _length(value: Any) -> int | None:
    """Return how many rows a value of a batch has, None if it is neither a list nor a tensor of rows."""
    return len(value) if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim) else None


def count_rows(batch: Mapping[str, Any]) -> Tensor:
    """Return the number of rows that a batch's loss is the mean of, 0-dim, on the batch's device.

    Args:
        batch: ``labels`` (B,) or (B, T): class ids, of which IGNORE_INDEX does not count, or scores (floating
            point), which all count. Without labels (answers to questions) every row of the first tensor counts.
    """
    labels = batch.get("labels")
    if labels is None:
        first = next(value for value in batch.values() if isinstance(value, Tensor) and value.ndim)
        # Filled on the device: a copy would make the host wait.
        return torch.full((), len(first), device=first.device)
    if labels.is_floating_point():
        return torch.full((), labels.numel(), device=labels.device)
    return (labels != IGNORE_INDEX).sum()


def count_tokens(batch: Mapping[str, Any], *, writes: bool) -> Tensor:
    """Return how many tokens of a batch are not padding, 0-dim: the inputs, and with ``writes`` the labels.

    Packed rows have no mask, so the little padding after them counts. Without token ids, rows are counted.
    """
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]) if "input_ids" in batch else None)
    read = count_rows(batch) if mask is None else mask.count_nonzero()
    return read + (batch["labels"] != IGNORE_INDEX).sum() if writes else read


def loss_factors(counts: Sequence[Tensor], accelerator: Accelerator) -> Tensor:
    """Return the factor for each micro-batch's loss that makes the step's gradient that of one mean (collective).

    The engines divide each loss by ``gradient_accumulation_steps`` and average gradients over ranks; the factors
    undo both. Equal counts give exactly 1, and the host does not wait.

    Args:
        counts: rows of each of this rank's micro-batches.
        accelerator: knows the ranks and the accumulation.

    Returns:
        (micro-batches,), fp32.
    """
    own = torch.stack(list(counts)).double()
    total: Any = accelerator.reduce(own.sum(), reduction="sum")
    means = accelerator.gradient_accumulation_steps * accelerator.num_processes
    return (own * means / total.clamp(min=1)).float()


@dataclass
class Position:
    """How far a run has come, between two optimizer steps."""

    step: int = 0
    """Optimizer steps taken, including skipped ones."""
    epoch: int = 0
    """Passes over the training rows before this one."""
    batches: int = 0
    """Micro-batches of this pass that each rank has trained on."""
    evaluated: bool = True
    """Whether the evaluation due after the step has been done."""
    stopped: bool = False
    """Whether an evaluation has ended the run."""

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the values of another."""
        vars(self).update(state)


class Step:
    """An optimizer step, from its micro-batches to the update; numbers count from 1."""

    def __init__(self, run: Run, number: int, batches: Sequence[MicroBatch]):
        self.number = number
        self._run, self._batches = run, batches
        self._logged: dict[str, Any] = {}
        self._grad_norm: Tensor | None = None

    def micro_batches(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yield each micro-batch, and the factor by which to multiply its loss (collective).

        The factors make the step's gradient that of one mean over all rows of all micro-batches and ranks, if the
        loss is a mean over the rows, or tokens, that count.
        """
        run, batches = self._run, self._batches
        factors = loss_factors([batch.count for batch in batches], run.accelerator)
        writes = run.config.task == "sequence to sequence"
        for batch, factor in zip(batches, factors, strict=True):
            # accelerate would ask the loader, which has already been read to the end of the step.
            run.accelerator.sync_gradients = batch is batches[-1]
            with nullcontext() if run.accelerator.sync_gradients else run.accelerator.no_sync(run.model):
                yield without_row_id(batch.inputs), factor
            run.meter.add(self._logged, count=batch.count, tokens=count_tokens(batch.inputs, writes=writes))
            self._logged = {}

    def log(self, **values: Any) -> None:
        """Record numbers of this micro-batch, 0-dim; their means over rows are logged when a log line is due.

        Names must be the same at every micro-batch and rank, with ``loss``; else a `TrainingError` follows.
        """
        self._logged |= values

    def backward(self, loss: Tensor) -> None:
        """Run backward on the loss of a micro-batch.

        Raises:
            TrainingError: a loss of the step is not finite. Raised on every rank, from the step's last backward:
                before its weights can be averaged or saved, and, unless DeepSpeed takes the step itself, before the
                weights are updated.
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
        """Clip the gradients to ``train.max_grad_norm``; 0 turns clipping off.

        DeepSpeed does its own clipping, inside backward, to the ``gradient_clipping`` of its configuration.
        """
        run = self._run
        if run.accelerator.distributed_type != DistributedType.DEEPSPEED:
            limit = run.config.train.max_grad_norm or float("inf")
            self._grad_norm = run.accelerator.clip_grad_norm_(run.model.parameters(), limit)

    def measured_grad_norm(self) -> float | None:
        """Return the norm of the gradients before clipping, None if the engine does not measure it."""
        measure: Any = getattr(self._run.model, "get_global_grad_norm", None)  # DeepSpeed's engine has it
        measured = self._grad_norm if measure is None else measure()
        return None if measured is None else float(measured)


class Meter:
    """Sums the logged values on the device, without waiting for it, and times the training steps.

    accelerate's own gathering would block every step.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._bad_losses = torch.zeros((), device=accelerator.device)
        self.load_state_dict({"names": (), "seconds": 0.0, "logged_at_s": 0.0})

    @property
    def seconds(self) -> float:
        """Seconds since training began, without pauses."""
        return time.monotonic() - self._started

    def add(self, values: Mapping[str, Tensor | float], *, count: Tensor, tokens: Tensor) -> None:
        """Add one micro-batch.

        Args:
            values: means over its rows by name, 0-dim tensors or plain numbers.
            count: number of its rows, 0-dim; if it is 0, no token counts either.
            tokens: number of its tokens, 0-dim.

        Raises:
            TrainingError: the values are not numbers under the same names as before, ``loss`` among them.
        """
        self._require_alike(values)
        double: Any = {"dtype": torch.float64, "device": self.sums.device}
        means = [
            (each.detach().to(**double) if isinstance(each, Tensor) else torch.full((), each, **double))
            * count
            for each in (values[name] for name in self.names)
        ]
        self.sums += torch.stack([*means, count.double(), (tokens * (count > 0)).double()])

    def note_loss(self, loss: Tensor) -> None:
        """Remember a loss that is not finite."""
        self._bad_losses += ~torch.isfinite(loss.detach())

    def send_bad_losses(self) -> SentCount:
        """Start sending how many ranks had a loss that is not finite since the last optimizer step (collective).

        One number is exchanged per optimizer step, during the step's last backward pass, so that the host does not
        wait for the device to be idle.
        """
        found: Any = self._accelerator.reduce(self._bad_losses, reduction="sum")
        self._bad_losses = torch.zeros_like(self._bad_losses)
        return SentCount(found > 0)

    def read(self) -> dict[str, float | None]:
        """Return means over all ranks' rows since the last call (0 of none), and tokens per second (collective)."""
        total: Any = self._accelerator.reduce(self.sums, reduction="sum")
        *sums, count, tokens = total.tolist()
        since, self.logged_at_s = self.logged_at_s, self.seconds
        self._begin(self.names)
        return {
            **{name: value / max(count, 1.0) for name, value in zip(self.names, sums, strict=True)},
            "tokens_per_second": tokens / (self.logged_at_s - since),
            "seconds": self.logged_at_s,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the times and the names, without this rank's sums."""
        return {"names": list(self.names), "seconds": self.seconds, "logged_at_s": self.logged_at_s}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the time from :meth:`state_dict`, with sums at zero."""
        self._begin(state["names"])
        self._has_names = False  # a resumed recipe may log something else
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

    def _require_alike(self, values: Mapping[str, Tensor | float]) -> None:
        """Refuse values that cannot be added to the sums (collective at the first micro-batch of the process)."""
        found = [{name: tuple(getattr(value, "shape", ())) for name, value in values.items()}]
        if not self._has_names:
            found, self._has_names = shared_ranks().gather(found[0]), True
            if found[0].keys() != {*self.names}:
                self._begin(found[0])
        expected = dict.fromkeys(self.names, ()) | {"loss": ()}
        if wrong := [each for each in found if each != expected]:
            raise TrainingError(
                f"step.log was given values of the shapes {wrong[0]}; expected {expected}, the names of the first "
                "micro-batch and loss, with one number each, at every micro-batch and on every rank"
            )

    def _begin(self, names: Sequence[str] | Mapping[str, Any]) -> None:
        self.names = tuple(names)
        """Names of the values that are logged, the same at every micro-batch."""
        self.sums = torch.zeros(len(names) + 2, dtype=torch.float64, device=self._accelerator.device)
        """This rank's sums since the last log line, on the device: values times rows, rows, tokens."""
