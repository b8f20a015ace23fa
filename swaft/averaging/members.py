"""Which optimizer steps have become members of which averages, and how many each has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from swaft.averaging.engines import Engine
from swaft.averaging.rules import Plan
from swaft.errors import AveragingError

if TYPE_CHECKING:
    from swaft.averaging.host import HostAverages
    from swaft.averaging.host.lanes import Lanes


class Members:
    """The members of a run's averages: takes the weights in after each step that a rule wants.

    Args:
        engine: whose weights; of its steps those from `applied_steps` on are followed.
        averages: of this rank.
        plans: by name of the rule.
        applied_steps: optimizer steps so far.
    """

    def __init__(self, engine: Engine, averages: HostAverages, plans: Mapping[str, Plan], applied_steps: int):
        self._engine, self._averages, self._plans = engine, averages, plans
        self.applied_steps = applied_steps
        self.counts = dict.fromkeys(plans, 0)
        self._begun: set[str] = set()
        self._proved = False
        if any(plan.first_step == applied_steps for plan in plans.values()):
            self._take_in(applied_steps)

    def step(self) -> None:
        """As `WeightAverager.step`."""
        applied, before = self._engine.applied_steps(), self.applied_steps
        if applied == before:
            return
        if self._engine.swap.active:
            raise AveragingError(
                "`averager.step()` was called while averaged weights are swapped in, which would be averaged as if "
                "they were trained; call it before `swapped_in()`, right after the optimizer step"
            )
        if applied < before:
            raise AveragingError(
                f"the engine's step count went back from {before} to {applied}: a checkpoint was loaded after the "
                "averager was attached; attach a new averager after loading"
            )
        missed = [
            step
            for step in range(before + 1, applied)
            if any(plan.takes(step) for plan in self._plans.values())
        ]
        if missed:
            raise AveragingError(
                f"the optimizer took {applied - before} steps since the last `averager.step()`, and step "
                f"{missed[0]} among them was to be averaged; expected a call after every optimizer step, and an "
                "averager that is attached after a checkpoint was loaded, not before"
            )
        refusal = self._refusal()
        self.applied_steps = applied
        self._take_in(applied)
        if refusal is not None:
            raise refusal

    def finish(self) -> None:
        """As `WeightAverager.wait`."""
        try:
            self._averages.finish()
        except AveragingError:
            self._recount()
            raise

    def ready(self, name: str) -> Lanes:
        """The vectors of a rule, once every member is in them.

        Raises:
            AveragingError: there is no member.
        """
        self.finish()
        lanes = self._averages.lanes[name]
        if lanes.count == 0:
            raise AveragingError(
                f"nothing is averaged yet at step {self.applied_steps}; the first member is the weights after step "
                f"{lanes.plan.first_step}: wait until then, or lower averaging.start"
            )
        return lanes

    def require_motion(self) -> None:
        """Refuse averages of weights that never changed (collective).

        Raises:
            AveragingError: on every rank.
        """
        motion = self._averages.motion
        if not self._engine.ranks.sum([motion.seen])[0] and motion.members > 2:
            raise AveragingError(
                f"{motion.members} members were averaged and all were the same bit for bit: either training does "
                "not change the weights (is the learning rate 0?) or the average does not see it"
            )

    def resume(self, applied_steps: int) -> None:
        """Continue from averages that have been loaded, after so many steps."""
        self._engine.continue_from(applied_steps)
        self.applied_steps, self._proved = applied_steps, False
        self._recount()
        self._begun = {name for name, count in self.counts.items() if count}

    def _take_in(self, step: int) -> None:
        taking = tuple(name for name, plan in self._plans.items() if plan.takes(step))
        if not taking:
            return
        for name in taking:
            first = self._plans[name].first_step
            self._plans[name].updates(self.counts[name])  # raises for more members than were planned
            if name not in self._begun and step != first:
                raise AveragingError(
                    f"the weights after step {first} were to be the first member of {name!r}, but the averager was "
                    f"attached after that step; attach it before step {first} of the run, load the averages that "
                    "were saved then (averager.load_state), or choose a later averaging.start"
                )
        if not self._proved and step > 0:
            self._engine.prove_layout()  # once more, now that the optimizer has written to the masters
            self._proved = True
        self._averages.submit(self._engine.masters(), step=step, rules=taking)
        self._begun |= set(taking)
        for name in taking:
            self.counts[name] += 1

    def _refusal(self) -> AveragingError | None:
        """Why the latest member was refused, the same on every rank; None where it was not."""
        try:
            self._averages.raise_if_refused()
        except AveragingError as refusal:
            self._recount()
            return refusal
        return None

    def _recount(self) -> None:
        self.counts = {name: lanes.count for name, lanes in self._averages.lanes.items()}
