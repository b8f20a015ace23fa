"""The weight averager: a rule, an engine and a host average, brought together behind three calls."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

from torch import Tensor, nn

from swaft.averaging import export
from swaft.averaging.engines import attach_engine
from swaft.averaging.host import HostAverage
from swaft.averaging.rules import Rule
from swaft.averaging.swap import swapped_in
from swaft.errors import AveragingError

logger = logging.getLogger(__name__)


class WeightAverager:
    """Averages the fp32 master weights of a training run, each rank its own shard, in host memory.

        averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0.5), total_steps=n)
        for batch in loader:
            ...                       # forward, accelerator.backward, optimizer.step
            averager.step()
        with averager.swapped_in():
            evaluate(model)
        averager.save_pretrained("final-averaged")

    Creating it is collective, and so are `step` at an averaging event, `swapped_in` and `save_pretrained`:
    every rank must make the same calls.

    Args:
        model: as `accelerator.prepare` returned it (or a plain module in one process).
        optimizer: likewise.
        rule: which steps enter the average, and with what weight.
        total_steps: optimizer steps of the whole run.

    Raises:
        ConfigError: the rule does not fit the run.
        UnsupportedEngineError, LayoutError: the engine's masters cannot be averaged faithfully.
    """

    def __init__(self, model: nn.Module, optimizer: Any, *, rule: Rule, total_steps: int):
        self._plan = rule.plan(total_steps)
        self.engine = attach_engine(model, optimizer)
        self._average = HostAverage(self.engine.spans)
        self._seen = self.engine.applied_steps()
        self._proved = False
        if self._seen == 0 and self._plan.takes(0):
            self._take_in()

    @property
    def applied_steps(self) -> int:
        """Optimizer steps that changed the weights, as of the last :meth:`step`."""
        return self._seen

    @property
    def num_averaged(self) -> int:
        """Members in the average so far."""
        return self._average.count

    @property
    def start_step(self) -> int:
        """The step whose weights are the first member."""
        return self._plan.first_step

    @property
    def total_members(self) -> int:
        """Members in the average at the end of the run."""
        return self._plan.num_members

    def step(self) -> None:
        """Take the weights in if an optimizer step happened since the last call and the rule wants it.

        Safe on every micro-batch: it counts steps that changed the weights, not calls.

        Raises:
            AveragingError: calls were missed while members were due, or the weights are not finite.
        """
        applied = self.engine.applied_steps()
        missed = [step for step in range(self._seen + 1, applied) if self._plan.takes(step)]
        if missed:
            raise AveragingError(
                f"the optimizer took {applied - self._seen} steps since the last `averager.step()`, and step "
                f"{missed[0]} among them was to be averaged; expected a call after every optimizer step"
            )
        if applied == self._seen:
            return
        self._seen = applied
        if self._plan.takes(applied):
            self._take_in()

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The averaged weights in the model, for evaluation (collective; every rank enters and leaves).

        Training goes on afterwards as if it had not happened, bit for bit, also when the body raises.

        Raises:
            AveragingError: nothing is averaged yet, a swap is active, or the average never moved.
        """
        self._require_members()
        with swapped_in(self.engine, self._average.mean):
            yield

    def shard(self) -> Tensor:
        """This rank's elements of the average: (engine.numel,), fp32, host."""
        return self._average.mean

    def drift(self) -> float:
        """Distance of the average from the live weights: ``||mean - masters||`` over all ranks (collective)."""
        return math.sqrt(self.engine.ranks.sum([self._average.squared_distance(self.engine.masters())])[0])

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Write the average as a Hugging Face folder in fp32 (collective; rank 0 writes).

        Raises:
            AveragingError: nothing is averaged yet, the average never moved, or the folder exists.
        """
        self._require_members()
        export.save_pretrained(self.engine, path, shard=self._average.mean)

    def _take_in(self) -> None:
        masters = self.engine.masters()
        finite, agreeing = self.engine.ranks.sum([self._average.is_finite(masters), self._seen])
        world_size = self.engine.ranks.world_size
        if finite < world_size:
            raise AveragingError(
                f"the weights after step {self._seen} are not finite on {world_size - int(finite)} of "
                f"{world_size} ranks; the average is left at its {self.num_averaged} members. Lower "
                "train.learning_rate or set train.max_grad_norm"
            )
        if agreeing != self._seen * world_size:
            raise AveragingError(
                f"this rank has taken {self._seen} optimizer steps and others a different number; expected "
                "the same on every rank"
            )
        if not self._proved and self._seen > 0:
            self.engine.prove_layout()  # once more, now that the optimizer has written to the masters
            self._proved = True
        (update,) = self._plan.updates(self._average.count)
        self._average.add(masters, update.weight)

    def _require_members(self) -> None:
        if self.num_averaged == 0:
            raise AveragingError(
                f"nothing is averaged yet at step {self._seen}; the first member is the weights after step "
                f"{self.start_step}: wait until then, or lower averaging.start"
            )
        self.engine.check_trainable()
        # Inside a swap the masters of an fp32 engine are the average, and drift says nothing.
        if self.num_averaged > 2 and not self.engine.swap.active and self.drift() == 0.0:
            raise AveragingError(
                f"the average of {self.num_averaged} weights equals the live weights bit for bit: either "
                "training does not change them (is the learning rate 0?) or the average does not see it"
            )
