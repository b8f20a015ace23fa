"""The weight averager: a few calls on top of rules, an engine and the averages in host memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import finalize

import torch
from torch import Tensor, nn

from swaft.averaging import export
from swaft.averaging.buffers import Statistics, recompute_statistics
from swaft.averaging.engines import attach_engine
from swaft.averaging.engines.steps import begin, refuse_missed, require_same
from swaft.averaging.rules import RECOMMENDED, Plan, Readout, Rule
from swaft.averaging.rules.base import plan_all
from swaft.averaging.shards import beside_live, blended
from swaft.averaging.state import UNNAMED, load_averages, save_averages
from swaft.averaging.swap import swapped_in
from swaft.errors import AveragingError

if TYPE_CHECKING:
    from swaft.averaging.host import Forecast, Lanes
    from swaft.averaging.host.pipeline import Waits


class WeightAverager:
    """Average the fp32 master weights of a training run in host memory; each rank averages its own shard.

        averager = swaft.WeightAverager(model, optimizer, total_steps=n)
        for batch in loader:
            ...                       # forward, accelerator.backward, optimizer.step
            averager.step()
        with averager.swapped_in():
            evaluate(model)
        averager.save_pretrained("final-averaged")

    Copies and arithmetic run on background threads while training continues. Between :meth:`step` and the next
    optimizer step, weights may be changed by hand only after :meth:`wait`.

    Creating it is collective, and so are `step` after an optimizer step, `swapped_in`, `drift` and
    `save_pretrained`: every rank must make the same calls.

    Args:
        model: as `accelerator.prepare` returned it (or a plain module in one process).
        optimizer: as `accelerator.prepare` returned it; if there are several, a list in the order they step.
        rule: which steps enter the average, and with what weight; or several rules by name, which share one copy of
            each member. Default: an EMA with a half-life of a tenth of the run (docs/evidence.md).
        total_steps: optimizer steps of the whole run.
        first_step: optimizer steps the run has already taken. None: taken from the counter of DeepSpeed's engine,
            or from the optimizer's state (Adam and its relatives).
        precision: of the running means. ``compensated`` takes 6 bytes per element and keeps 32 bits; ``plain``
            takes 4 and loses digits in long runs (docs/methods.md).
        threads: threads for the arithmetic on this rank; None: half of this rank's share of the cores, at most 8.
        spill_dir: folder on a local disk of this node, to which finished blocks and snapshots are moved; None keeps
            them in memory.

    Raises:
        ConfigError: a rule does not fit the run.
        UnsupportedEngineError, LayoutError: the engine's masters cannot be averaged faithfully.
        AveragingError: the ranks were given different rules, the run is past `total_steps`, or the averages do not
            fit in host memory.
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
        # The compiled code takes a second to import; only runs that average should pay for it.
        from swaft.averaging.host import HostAverages

        rules = dict(rule) if isinstance(rule, Mapping) else {UNNAMED: rule}
        self._plans = plan_all(rules, total_steps, precision)
        self.engine = attach_engine(model, optimizer)
        require_same(self.engine.ranks.gather(repr((rules, total_steps, precision, first_step))))
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
        # Everything that writes to the masters waits until the current member has been read.
        self.engine.before_steps(self._averages.pipeline.release_masters)
        self.engine.swap.readers.add(self._averages.pipeline)
        self._end = finalize(self, self._averages.close)
        self._counts = dict.fromkeys(self._plans, 0)
        self._since = self.applied_steps
        if any(plan.first_step == self.applied_steps for plan in self._plans.values()):
            self._take_in(self.applied_steps)

    def step(self) -> None:
        """Add the weights to the averages if an optimizer step happened since the last call and a rule takes it.

        Safe to call on every micro-batch: it counts steps that changed the weights, not calls. A problem with a
        member is raised on every rank by the call after the next optimizer step. That call still takes in its own
        step, so code that catches the error may continue.

        Raises:
            AveragingError: calls were missed while members were due, the step count went back, a newer averager
                has taken over with another optimizer, averaged weights are swapped in, there are more members than
                the rule planned, or the previous member was refused.
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
        """Block until every member is in the average; after that, weights may be changed by hand.

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
        """Put the averaged weights into the model, for evaluation (collective; every rank enters and leaves).

        Training continues afterwards as if nothing had happened, bit for bit, even if the body raises. Inside, the
        parameters are the average. Anything that would save them as the live weights (`state_dict`, DeepSpeed's and
        accelerate's saving, pickling) or replace them (`load_state_dict`, loading a checkpoint, an optimizer step)
        is refused. `copy.deepcopy(model)` returns a model that keeps the average.

        Args:
            readout: which average: a rule's name, or a `Readout`, for a window of it, for instance. None: the
                average of the first rule.
            blend: uses ``last + blend * (average - last)``, from -1 to 2: exactly the live weights at 0, and
                exactly the average at 1. None: the blend of the readout.

        Raises:
            AveragingError: nothing is averaged yet, members were missed, a swap is active, or the average never
                moved; on exit: weights were changed inside.
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
        """Compute the running statistics (of BatchNorm) that belong to an average, from training rows (collective).

        Like `torch.optim.swa_utils.update_bn`, but under every engine: the averaged weights are swapped in, the
        model runs the batches in training mode without gradients, and a layer's statistics become the plain means
        of those of all batches on all ranks. Until the next member is taken in, `swapped_in` and `save_pretrained`
        use them for this average; `save_state` does not store them. Training continues as if nothing had happened.
        A model without such statistics is left alone.

        Args:
            batches: this rank's batches, as many as on every other rank.
            readout: as for :meth:`swapped_in`.
            forward: called with each batch, to run it through the model. None: a mapping is passed as keyword
                arguments, and of a list or tuple the first element.

        Raises:
            AveragingError: as for :meth:`swapped_in`; or the ranks have no batches, or unequal numbers of them.
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
        note: str = "",
    ) -> None:
        """Write an average as a Hugging Face folder (collective; rank 0 writes).

        Args:
            path: folder to write. A model with a format of its own (SentenceTransformer) gives a warning, and only
                `model.safetensors`: call `copy.deepcopy(model).save_pretrained` inside :meth:`swapped_in` instead.
            readout: as for :meth:`swapped_in`.
            blend: as for :meth:`swapped_in`.
            dtype: of the floating-point tensors, as for `swaft.averaging.save_pretrained`.
            max_shard_size: maximum size of one file, such as ``"5GB"``.
            note: for the model card, added to what it says these weights are.

        Raises:
            AveragingError: nothing is averaged yet, members were missed, it never moved, or the folder exists.
            ConfigError: there is no such dtype.
        """
        chosen = self.chosen(readout, blend)
        shard = self.shard_together(chosen)
        plan, count = self.plan(chosen.rule), self.count(chosen.rule)
        averaged = f"weights of a training run, averaged by `{plan.rule!r}`: {plan.in_words(count, chosen)}"
        export.save_pretrained(
            self.engine,
            path,
            shard=shard if chosen.blend else None,
            statistics=self._statistics.of(*self._average(chosen)),
            dtype=dtype,
            max_shard_size=max_shard_size,
            description=(averaged if chosen.blend else "the last weights of a training run") + note,
        )

    def save_state(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Save the averages, so that a later run can resume from them under any engine and world size (collective).

        Every rank writes its own elements; nothing is gathered. Safe inside `swapped_in`. The folder holds only
        tensors and text, and is complete once it contains a file ``COMPLETE``.

        Args:
            path: folder to write. Without `overwrite` it must not exist or must be empty.
            overwrite: replace an existing state once the new one is complete, so that there is always one of the
                two. A folder that holds anything else is refused.

        Raises:
            StateError: the state could not be written. Raised on every rank, and nothing is left behind.
            AveragingError: the latest member was refused, members were missed, or averaging failed on a rank.
        """
        with self.engine.ranks.together():
            self._refuse_stale()
            self.wait()
            self.engine.check_trainable()
        save_averages(self.engine, self._averages, path, self.applied_steps, overwrite=overwrite)

    def load_state(self, path: str | PathLike[str], *, same_weights: bool = True) -> None:
        """Resume from averages that :meth:`save_state` wrote, under any layout (collective).

        Call it after the model and optimizer have been loaded and before the first step. The step count continues
        from the saved one.

        Args:
            path: the folder.
            same_weights: refuse averages that were saved with other weights than the model has now; pass False to
                resume with different weights on purpose.

        Raises:
            StateError: the folder is incomplete, damaged, of another model, or of a run with other rules; on every
                rank. The averages are unchanged, unless a file was damaged after its check.
            AveragingError: averaging failed on a rank, or averaged weights are swapped in.
        """
        with self.engine.ranks.together():
            self.wait()
            if self.engine.swap.active:
                raise AveragingError("a state was loaded while a swap is active; leave the swap first")
        self.applied_steps = load_averages(self.engine, self._averages, path, same_weights=same_weights)
        self.engine.continue_from(self.applied_steps)
        self._recount()
        self._since = self.applied_steps

    @property
    def state_dict(self) -> Any:
        """Not available: `accelerator.register_for_checkpointing` would silently keep only rank 0's averages.

        Raises:
            AveragingError: on attribute access; the message says how to save the averages.
        """
        raise AveragingError(
            "the averages are sharded over the ranks, and a state dict (as accelerator.register_for_checkpointing "
            "keeps it), a pickle or a copy would hold those of one rank; expected averager.save_state(path) and "
            "averager.load_state on all ranks, or swaft.register_averager(accelerator, averager)"
        )

    __reduce__ = state_dict  # type: ignore[assignment]  # nor is it pickled or copied

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of the rules, in the order they were given; the first is the default everywhere."""
        return tuple(self._plans)

    def plan(self, name: str | None = None) -> Plan:
        """The averaging events of a rule, as a `Plan`."""
        return self._plans[self._named(name)]

    def count(self, name: str | None = None) -> int:
        """Members that a rule has taken in so far, including those still being processed."""
        return self._counts[self._named(name)]

    @property
    def num_averaged(self) -> int:
        """Members in the average of the first rule: its `count`, less those that the rule has dropped (LAWA)."""
        return len(self._average(self.chosen(None))[1]) if self.count() else 0

    @property
    def waits(self) -> Waits:
        """How often averaging has blocked training, and for how many seconds in all."""
        return self._averages.pipeline.waits

    def forecast(self) -> Forecast:
        """What the run's averages cost on this rank: memory, bytes copied, and time."""
        return self._averages.forecast()

    def chosen(self, readout: str | Readout | None, blend: float | None = None) -> Readout:
        """The requested readout, with its rule named and its blend filled in.

        Raises:
            AveragingError: no rule has that name, or there is no such blend.
        """
        chosen = readout if isinstance(readout, Readout) else Readout(readout)
        blend = chosen.blend if blend is None else blend
        return replace(chosen, rule=self._named(chosen.rule), blend=blend)

    def shard(self, readout: str | Readout | None = None) -> Tensor:
        """This rank's elements of an average: (engine.numel,), fp32, host. Do not modify it; it is valid until the
        next :meth:`step`, and only in this process: a forked one may find zeros in it.

        Raises:
            AveragingError: nothing is averaged yet, or the rule does not offer this choice.
        """
        chosen = self.chosen(readout)
        return blended(self.engine, self._ready(chosen).shard(chosen), chosen)

    def lane_shards(self, readout: str | Readout | None = None) -> list[tuple[float, Tensor]]:
        """The terms an average is the sum of: (coefficient, this rank's elements) pairs, as in `shard`.

        For rules that keep whole members (LAWA), the tensors are those members. In a blend, the last term is the
        live weights. A scope is refused.
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

    def close(self) -> None:
        """End averaging, before training ends: what is averaged can still be read and saved."""
        self._end()

    def _refuse_misuse(self, before: int, applied: int) -> None:
        """Refuse a call of :meth:`step` after which an average would no longer match its rule."""
        if self.engine.swap.active:
            raise AveragingError(
                "`averager.step()` was called while averaged weights are swapped in, which would be averaged as if "
                "they were trained; call it before `swapped_in()`, right after the optimizer step"
            )
        if applied < before:
            raise AveragingError(
                f"the engine's step count went back from {before} to {applied}: a checkpoint was loaded after the "
                "averager was attached; load its averages too (averager.load_state), or attach a new averager then"
            )
        refuse_missed(self._plans.values(), before, applied)

    def _refuse_stale(self) -> None:
        """Refuse to read or save averages that lack members of the announced run: :meth:`step` was not called."""
        if self.applied_steps < self.plan().total_steps and self._end.alive and not self.engine.superseded:
            refuse_missed(self._plans.values(), self.applied_steps, self.engine.applied_steps())

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
                    f"attached after that step; attach it before step {first} of the run (with first_step=0 if a "
                    "new run begins here), load the averages of then (averager.load_state), or choose a later start"
                )
        self.engine.prove_member(step, is_first=not any(self._counts.values()))
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

    def _average(self, chosen: Readout) -> tuple[Readout, range]:
        """The readout in canonical form, and the members in it."""
        return self.plan(chosen.rule).resolved(self.count(chosen.rule), chosen)

    def _ready(self, chosen: Readout) -> Lanes:
        """The lanes of a rule, once every member is in them."""
        self._refuse_stale()
        self.wait()
        lanes = self._averages.lanes[self._named(chosen.rule)]
        if lanes.count == 0:
            raise AveragingError(
                f"nothing is averaged yet at step {self.applied_steps}; the first member is the weights after step "
                f"{lanes.plan.first_step}: wait until then, or start earlier (the rule's start)"
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
