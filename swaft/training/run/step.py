"""One optimizer step of a recipe's loop, and how far a run has come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType
from torch import Tensor

from swaft.errors import TrainingError
from swaft.training.evaluation.evaluate import without_row_id
from swaft.training.run.batches import MicroBatch, loss_factors
from swaft.training.run.meter import count_tokens

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
