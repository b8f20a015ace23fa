"""The weight averager: rules, an engine and the averages in host memory, brought together behind a few calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakMethod, finalize

import torch
from torch import Tensor, nn

from swaft.averaging import export
from swaft.averaging.buffers import Statistics, recompute_statistics
from swaft.averaging.engines import attach_engine
from swaft.averaging.engines.steps import begin, hook_weakly
from swaft.averaging.rules import RECOMMENDED, Plan, Readout, Rule
from swaft.averaging.rules.base import plan_all
from swaft.averaging.shards import beside_live, blended
from swaft.averaging.state import load_averages, save_averages
from swaft.averaging.swap import swapped_in
from swaft.errors import AveragingError

if TYPE_CHECKING:
    from swaft.averaging.host import Forecast, Lanes
    from swaft.averaging.host.pipeline import Waits


class WeightAverager:
    """Averages the fp32 master weights of a training run, each rank its own shard, in host memory.

        averager = swaft.WeightAverager(model, optimizer, total_steps=n)
        for batch in loader:
            ...                       # forward, accelerator.backward, optimizer.step
            averager.step()
        with averager.swapped_in():
            evaluate(model)
        averager.save_pretrained("final-averaged")

    Copies and arithmetic run on threads of their own, behind the training step. Between :meth:`step` and the next
    optimizer step, weights may be changed by hand only after :meth:`wait`.

    Creating it is collective, and so are `step` after an optimizer step, `swapped_in`, `drift` and
    `save_pretrained`: every rank must make the same calls.

    Args:
        model: as `accelerator.prepare` returned it (or a plain module in one process).
        optimizer: likewise.
        rule: which steps enter the average, and with what weight; or several rules by name, which share one copy
            of every member. Left out: an EMA with a half-life of a tenth of the run (docs/evidence.md).
        total_steps: optimizer steps of the whole run.
        first_step: optimizer steps that the run has taken already. None: as many as DeepSpeed's engine has counted,
            or the optimizer's state says (Adam's and its relatives').
        precision: of a running mean. ``compensated`` takes 6 bytes an element and keeps 32 bits; ``plain`` takes
            4 and loses digits in long runs (:meth:`forecast` says how many).
        threads: threads that do the arithmetic on this rank; None: half of its share of the cores, at most 8.
        spill_dir: folder, on a disk of this node, that finished blocks and snapshots move to; None keeps them in
            memory.

    Raises:
        ConfigError: a rule does not fit the run.
        UnsupportedEngineError, LayoutError: the engine's masters cannot be averaged faithfully.
        AveragingError: the ranks were given different rules, the run is past `total_steps`, or the averages do
            not fit into host memory.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        rule: Rule | Mapping[str, Rule] = RECOMMENDED,
        total_steps: int,
        first_step: int | None = None,
        precision: Literal["compensated", "plain"] = "compensated",
        threads: int | None = None,
        spill_dir: str | PathLike[str] | None = None,
    ):
        # Compiled code takes a second to import, which only those pay who average.
        from swaft.averaging.host import HostAverages

        rules = dict(rule) if isinstance(rule, Mapping) else {"average": rule}
        self._plans = plan_all(rules, total_steps, precision)
        self.engine = attach_engine(model, optimizer)
        _require_same(self.engine.ranks.gather(repr((rules, total_steps, precision, first_step))))
        self.applied_steps = begin(self.engine, first_step, total_steps)
        """Optimizer steps that changed the weights, as of the last :meth:`step`."""
        self._averages = HostAverages(
            self.engine,
            self._plans,
            compensated=precision == "compensated",
            threads=threads,
            spill_dir=None if spill_dir is None else Path(spill_dir),
        )
        self._statistics = Statistics(self.engine)
        # All that writes to the masters waits until a member has been read.
        release = self._averages.pipeline.release_masters
        hook_weakly(self.engine.inner_optimizer.register_step_pre_hook, release)
        self.engine.swap.readers.append(WeakMethod(release))
        self.close = finalize(self, self._averages.close)
        self._counts = dict.fromkeys(self._plans, 0)
        self._since, self._proved = self.applied_steps, False
        if any(plan.first_step == self.applied_steps for plan in self._plans.values()):
            self._take_in(self.applied_steps)

    def step(self) -> None:
        """Take the weights in if an optimizer step happened since the last call and a rule wants it.

        Safe on every micro-batch: it counts steps that changed the weights, not calls. What is wrong with a member
        is raised, on every rank, by the call after the next optimizer step, which takes that step in all the same:
        whoever catches the error may continue.

        Raises:
            AveragingError: calls were missed while members were due, the step count went back, averaged weights are
                swapped in, a member is one more than the rule planned, or the member before was refused.
        """
        applied, before = self.engine.applied_steps(), self.applied_steps
        if applied == before:
            return
        self._refuse_misuse(before, applied)
        try:
            self._averages.pipeline.raise_if_refused()  # the same on every rank
        except AveragingError:
            self._recount()
            raise
        finally:
            self.applied_steps = applied
            self._take_in(applied)

    def wait(self) -> None:
        """Return once every member is in the average: from then on weights may be changed by hand.

        Raises:
            AveragingError: the latest member was refused, or averaging failed on this rank.
        """
        try:
            self._averages.pipeline.finish()
        except AveragingError:
            self._recount()
            raise

    @contextmanager
    def swapped_in(
        self, readout: str | Readout | None = None, *, blend: float | None = None
    ) -> Iterator[None]:
        """The averaged weights in the model, for evaluation (collective; every rank enters and leaves).

        Training continues afterwards as if it had not happened, bit for bit, also when the body raises. Inside,
        the parameters are the average; whatever would save them as the live ones (`state_dict`, DeepSpeed's and
        accelerate's saving, pickling) or replace them (`load_state_dict`, loading a checkpoint, an optimizer
        step) is refused. `copy.deepcopy(model)` is a model that keeps the average.

        Args:
            readout: which average: of the rule of this name, or as a `Readout` says: a window of it, for instance.
                None: that of the first rule.
            blend: puts ``last + blend * (average - last)`` in place, from -1 to 2: exactly the live weights at 0,
                and the average at 1. None: as the readout says.

        Raises:
            AveragingError: nothing is averaged yet, a swap is active, or the average never moved; on the way out,
                weights were changed inside.
        """
        chosen = self.chosen(readout, blend)
        shard = self.shard_together(chosen)
        statistics = self._statistics.of(*self._average(chosen))
        with swapped_in(self.engine, shard, statistics, derive=chosen.blend != 0):
            yield

    def update_bn(
        self,
        batches: Iterable[Any],
        readout: str | Readout | None = None,
        *,
        forward: Callable[[Any], Any] | None = None,
    ) -> None:
        """Compute the running statistics (BatchNorm's) that go with an average, from training rows (collective).

        As `torch.optim.swa_utils.update_bn`, under every engine: the averaged weights are swapped in, the model
        sees the batches in training mode without gradients, and a layer's statistics become the plain means of
        those of all batches of all ranks. Until another member is taken in, `swapped_in` and `save_pretrained`
        of this average use them; they are not in `save_state`. Training continues as if nothing had happened. A
        model without such statistics is left alone.

        Args:
            batches: of this rank, as many as on every other.
            readout: as of :meth:`swapped_in`.
            forward: called with each batch, to pass it through the model. None: a mapping is passed as keyword
                arguments; of a list or tuple the first is passed.

        Raises:
            AveragingError: as of :meth:`swapped_in`; or the ranks have no batches, or not equally many.
        """
        chosen = self.chosen(readout)
        with self.swapped_in(chosen):
            found = recompute_statistics(self.engine, batches, forward)
        self._statistics.keep(*self._average(chosen), found)

    def save_pretrained(
        self,
        path: str | PathLike[str],
        readout: str | Readout | None = None,
        *,
        blend: float | None = None,
        dtype: str | torch.dtype = torch.float32,
        max_shard_size: str | int = export.SHARD_SIZE,
    ) -> None:
        """Write an average as a Hugging Face folder (collective; rank 0 writes).

        Args:
            path: folder to write.
            readout: as of :meth:`swapped_in`.
            blend: likewise.
            dtype: of floating-point tensors in the folder, ``float32``, ``bfloat16`` or ``float16``, by name or
                torch's. Of any but fp32, what rounding takes away is logged.
            max_shard_size: of one file, such as ``"5GB"``.

        Raises:
            AveragingError: nothing is averaged yet, the average never moved, or the folder exists.
            ConfigError: for another dtype.
        """
        chosen = self.chosen(readout, blend)
        shard = self.shard_together(chosen)
        plan, count = self.plan(chosen.rule), self.count(chosen.rule)
        means = f"the average of a training run's weights by `{plan.rule!r}` (steps taken in: {count:,})"
        export.save_pretrained(
            self.engine,
            path,
            shard=shard if chosen.blend else None,
            statistics=self._statistics.of(*self._average(chosen)),
            dtype=dtype,
            max_shard_size=max_shard_size,
            description=means + (f" with {chosen.choices}" if chosen.choices else ""),
        )

    def save_state(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write the averages for a later run to resume from, under any engine and world size (collective).

        Every rank writes its own elements; nothing is gathered. Safe inside `swapped_in`. The folder is one of
        tensors and text alone, complete once it holds a file ``COMPLETE``.

        Args:
            path: folder to write. Without `overwrite` it must not exist, or be empty.
            overwrite: replace a state that is there already, once the new one is complete: at no moment is there
                neither. A folder that holds anything else is refused.

        Raises:
            StateError: it could not be written; on every rank, and nothing is left of it.
            AveragingError: the latest member was refused, or averaging failed on a rank.
        """
        with self.engine.ranks.together():
            self.wait()
            self.engine.check_trainable()
        save_averages(self.engine, self._averages, path, self.applied_steps, overwrite=overwrite)

    def load_state(self, path: str | PathLike[str], *, same_weights: bool = True) -> None:
        """Resume from averages that :meth:`save_state` wrote, in whatever layout (collective).

        To be called after model and optimizer were loaded, and before the first step. The step count continues from
        that of the state.

        Args:
            path: the folder.
            same_weights: refuse averages that were saved beside other weights than the model has now; False
                where it is meant to resume from others.

        Raises:
            StateError: the folder is incomplete or damaged, of another model, or of a run with other rules; on
                every rank, and the averages are as they were unless a file was damaged after it had been checked.
            AveragingError: averaging failed on a rank, or averaged weights are swapped in.
        """
        with self.engine.ranks.together():
            self.wait()
            if self.engine.swap.active:
                raise AveragingError("a state was loaded while a swap is active; leave the swap first")
        self.applied_steps = load_averages(self.engine, self._averages, path, same_weights=same_weights)
        self.engine.continue_from(self.applied_steps)
        self._recount()
        self._since, self._proved = self.applied_steps, False

    @property
    def state_dict(self) -> Any:
        """There is none: `accelerator.register_for_checkpointing` would keep rank 0's alone, in silence.

        Raises:
            AveragingError: as the attribute is looked up, saying what keeps the averages.
        """
        raise AveragingError(
            "the averages are spread over the ranks, and a state dict (as accelerator.register_for_checkpointing "
            "keeps it) would hold those of rank 0; expected averager.save_state(path) and averager.load_state "
            "by all of them, or register_averager(accelerator, averager) of swaft's integrations"
        )

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of the rules, in the order they were given; the first is the default everywhere."""
        return tuple(self._plans)

    def plan(self, name: str | None = None) -> Plan:
        """The averaging events of a rule."""
        return self._plans[self._named(name)]

    def count(self, name: str | None = None) -> int:
        """Members in the average of a rule so far, those on their way included."""
        return self._counts[self._named(name)]

    @property
    def num_averaged(self) -> int:
        """`count` of the first rule."""
        return self.count()

    @property
    def waits(self) -> Waits:
        """How often averaging has blocked training, and for how many seconds in all."""
        return self._averages.pipeline.waits

    def forecast(self) -> Forecast:
        """What the run's averages take on this rank: memory, bytes copied, time, and the plain form's error."""
        return self._averages.forecast()

    def chosen(self, readout: str | Readout | None, blend: float | None = None) -> Readout:
        """What is asked for, its rule by name.

        Raises:
            AveragingError: no rule has that name, or there is no such blend.
        """
        chosen = readout if isinstance(readout, Readout) else Readout(readout)
        blend = chosen.blend if blend is None else blend
        return replace(chosen, rule=self._named(chosen.rule), blend=blend)

    def shard(self, readout: str | Readout | None = None) -> Tensor:
        """This rank's elements of an average: (engine.numel,), fp32, host. Not to be changed; valid until the next
        :meth:`step`.

        Raises:
            AveragingError: nothing is averaged yet, or a choice that the rule does not offer.
        """
        chosen = self.chosen(readout)
        return blended(self.engine, self._ready(chosen).shard(chosen), chosen)

    def lane_shards(self, readout: str | Readout | None = None) -> list[tuple[float, Tensor]]:
        """What an average is the sum of: (coefficient, this rank's elements) pairs, as `shard` gives them.

        For rules that keep members whole (LAWA), the tensors are those members; last come, in a blend, the last
        weights. A scope is refused.
        """
        chosen = self.chosen(readout)
        if chosen.scope != "all":
            raise AveragingError(f"scope is {chosen.scope!r}; expected 'all', as members are of all weights")
        lanes = self._ready(chosen).readout(chosen)
        shards = [(chosen.blend * coefficient, lane.mean) for coefficient, lane in lanes]
        return shards if chosen.blend == 1 else [*shards, (1 - chosen.blend, self.engine.live_shard())]

    def drift(self, readout: str | Readout | None = None) -> float:
        """Distance of an average from the live weights, ``||mean - masters||`` over all ranks (collective)."""
        pairs = beside_live(self.engine, self.shard_together(self.chosen(readout)))
        total = sum(float((averaged.double() - live.double()).square().sum()) for live, averaged in pairs)
        return math.sqrt(self.engine.ranks.sum([total])[0])

    def _refuse_misuse(self, before: int, applied: int) -> None:
        """Refuse a call of :meth:`step` after which an average would be of other weights than its rule says."""
        if self.engine.swap.active:
            raise AveragingError(
                "`averager.step()` was called while averaged weights are swapped in, which would be averaged as if "
                "they were trained; call it before `swapped_in()`, right after the optimizer step"
            )
        if applied < before:
            raise AveragingError(
                f"the engine's step count went back from {before} to {applied}: a checkpoint was loaded after the "
                "averager was attached; attach a new averager after loading"
            )
        between = range(before + 1, applied)
        missed = [step for step in between if any(plan.takes(step) for plan in self._plans.values())]
        if missed:
            raise AveragingError(
                f"the optimizer took {applied - before} steps since the last `averager.step()`, and step "
                f"{missed[0]} among them was to be averaged; expected a call after every optimizer step, and an "
                "averager that is attached after a checkpoint was loaded, not before"
            )

    def _take_in(self, step: int) -> None:
        taking = tuple(name for name, plan in self._plans.items() if plan.takes(step))
        if not taking:
            return
        for name in taking:
            first = self._plans[name].first_step
            self._plans[name].updates(self._counts[name])  # raises for more members than were planned
            if not self._counts[name] and first < self._since:
                raise AveragingError(
                    f"the weights after step {first} were to be the first member of {name!r}, but the averager was "
                    f"attached after that step; attach it before step {first} of the run, load the averages that "
                    "were saved then (averager.load_state), or choose a later averaging.start"
                )
        if not self._proved and step > 0:
            self.engine.prove_layout()  # once more, now that the optimizer has written to the masters
            self._proved = True
        self._averages.submit(self.engine.masters(), step=step, rules=taking)
        self._counts |= {name: self._counts[name] + 1 for name in taking}

    def _recount(self) -> None:
        self._counts = {name: lanes.count for name, lanes in self._averages.lanes.items()}

    def _named(self, name: str | None) -> str:
        if name is None:
            return self.rules[0]
        if name not in self._plans:
            raise AveragingError(f"no rule is called {name!r}; expected one of {', '.join(self._plans)}")
        return name

    def _average(self, chosen: Readout) -> tuple[Readout, int]:
        """What is chosen in one spelling, and how many members are in it."""
        average, members = self.plan(chosen.rule).resolved(self.count(chosen.rule), chosen)
        return average, len(members)

    def _ready(self, chosen: Readout) -> Lanes:
        """The vectors of a rule, once every member is in them."""
        self.wait()
        lanes = self._averages.lanes[self._named(chosen.rule)]
        if lanes.count == 0:
            raise AveragingError(
                f"nothing is averaged yet at step {self.applied_steps}; the first member is the weights after step "
                f"{lanes.plan.first_step}: wait until then, or lower averaging.start"
            )
        return lanes

    def shard_together(self, chosen: Readout) -> Tensor:
        """:meth:`shard`, once every rank has its own and the weights have been seen to change (collective)."""
        with self.engine.ranks.together():
            shard = self.shard(chosen)
            self.engine.check_trainable()
        changes = self._averages.changes
        if not self.engine.ranks.sum([changes.seen])[0] and changes.members > 2:
            raise AveragingError(
                f"{changes.members} members were averaged and all were the same bit for bit: either training does "
                "not change the weights (is the learning rate 0?) or the average does not see it"
            )
        return shard


def _require_same(settings: list[str]) -> None:
    for rank, other in enumerate(settings):
        if other != settings[0]:
            raise AveragingError(
                f"rank {rank} was given (rules, total_steps, precision, first_step) = {other}, and rank 0 "
                f"{settings[0]}; expected the same on every rank"
            )
